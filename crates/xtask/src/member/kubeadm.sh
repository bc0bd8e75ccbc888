# A machine that kubeadm prepares: its usual places, empty, and the program by the name of kubelet, started as systemd would.
# Arguments: orlop, kubeadm, scratch directory, address of the API server, address of the node, its name.
set -eu
orlop=$1 kubeadm=$2 scratch=$3 server=$4 address=$5 name=$6

for place in /etc/kubernetes /var/lib/kubelet /var/lib/orlop /run/orlop /etc/cni /var/log/pods; do
    mkdir -p "$place"
    mount -t tmpfs tmpfs "$place"
done
mkdir -p "$scratch/bin"
ln -s "$orlop" "$scratch/bin/kubelet"
export PATH="$scratch/bin:$PATH"

start_kubelet() {
    until [ -e /var/lib/kubelet/config.yaml ] && [ -e /var/lib/kubelet/kubeadm-flags.env ]; do sleep 0.1; done
    . /var/lib/kubelet/kubeadm-flags.env
    # shellcheck disable=SC2086 # flags, parted by spaces
    exec kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \
        --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS --node-ip="$address"
}
start_kubelet > "$scratch/kubelet.log" 2>&1 &
kubelet=$!
trap 'kill $kubelet 2> /dev/null || true; wait $kubelet || true' EXIT

# The administrator's part.
echo 1 > /proc/sys/net/ipv4/ip_forward

# Of what kubeadm looks at beforehand, errors in these are no obstacle:
# - CRI, ContainerRuntimeVersion: the runtime is the kubelet, which starts when kubeadm has written what it goes by;
# - SystemVerification: upstream's kubelet refuses control groups of version 1, which this machine may have.
ignored=CRI,ContainerRuntimeVersion,SystemVerification
"$kubeadm" join "$server" --token abcdef.0123456789abcdef --discovery-token-unsafe-skip-ca-verification \
    --cri-socket unix:///run/orlop/cri.sock --node-name "$name" --ignore-preflight-errors="$ignored"
# Until somebody has seen enough.
read -r _ || true
