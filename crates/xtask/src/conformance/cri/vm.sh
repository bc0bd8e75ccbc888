# In the machine: a registry with the suite's images, the runtime, and the specs; what they say goes to the serial line, the
# report to a file that the next job prints. Arguments are the suite's own.
set -e
lab=/var/tmp/lab
mkdir -p $lab /var/run/nri /var/cache/apparmor
cp -r /jobs/certs.d $lab/certs.d
# The suite loads profiles that include what distributions have.
cp -r /jobs/apparmor.d/. /etc/apparmor.d/
mkdir -p /etc/apparmor
touch /etc/apparmor/parser.conf
cat >$lab/registry.yml <<END
version: 0.1
log: { level: warn }
storage:
  filesystem: { rootdirectory: /jobs/registry/storage }
  maintenance: { readonly: { enabled: true } }
http: { addr: 127.0.0.1:5000 }
END
docker-registry serve $lab/registry.yml >$lab/registry.log 2>&1 &
# A plugin of the suite takes two seconds for what the default gives two for, on machines that are no slower than others.
mkdir -p /etc/orlop
cat >/etc/orlop/runtime.yaml <<END
apiVersion: orlop/v1
kind: RuntimeConfiguration
nri: { pluginRequestTimeout: 30s }
END
socket=/run/orlop/cri.sock
orlop runtime --registry-config-dir $lab/certs.d --cni-conf-dir $lab/no-cni >$lab/runtime.log 2>&1 &
tries=0
until test -S $socket && wget -q -O /dev/null http://127.0.0.1:5000/v2/; do
    tries=$((tries + 1))
    if test $tries -ge 600; then
        cat $lab/registry.log $lab/runtime.log
        exit 1
    fi
    sleep 0.2
done
ended=0
critest -runtime-endpoint=unix://$socket -nri-socket=/var/run/nri/nri.sock -ginkgo.no-color -ginkgo.v \
    -ginkgo.json-report=$lab/report.json "$@" || ended=$?
echo "the runtime's log ends with:"
tail -n 20 $lab/runtime.log
exit $ended
