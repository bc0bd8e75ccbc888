// A plugin of the Node Resource Interface that writes down what it is told, and does as the annotations of a pod say.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

type plugin struct {
	stub stub.Stub
	out  *os.File
}

func (p *plugin) tell(format string, words ...any) {
	fmt.Fprintf(p.out, format+"\n", words...)
}

// Configure is told the file to write to.
func (p *plugin) Configure(_ context.Context, config, runtime, version string) (stub.EventMask, error) {
	out, err := os.OpenFile(config, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	p.out = out
	p.tell("configured by %s, version: %t", runtime, version != "")
	return 0, nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p.tell("synchronized %d %d", len(pods), len(containers))
	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	if pod.GetAnnotations()["refuse"] == "pod" {
		return errors.New("no room on deck")
	}
	p.tell("run pod %s %d", pod.GetName(), len(pod.GetIps()))
	return nil
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.tell("stop pod %s", pod.GetName())
	return nil
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.tell("remove pod %s", pod.GetName())
	return nil
}

func shares(id string, value uint64) []*api.ContainerUpdate {
	update := &api.ContainerUpdate{}
	update.SetContainerId(id)
	update.SetLinuxCPUShares(value)
	return []*api.ContainerUpdate{update}
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.tell("create %s/%s", pod.GetName(), container.GetName())
	adjust := &api.ContainerAdjustment{}
	annotations := pod.GetAnnotations()
	switch {
	case annotations["refuse"] == "container":
		return nil, nil, errors.New("not this one")
	case annotations["hang"] != "" && annotations["hang"] == p.name():
		time.Sleep(time.Hour)
	case annotations["adjust"] == p.name() || annotations["adjust"] == "all":
		adjust.AddEnv("FROM_PLUGIN", p.name())
		adjust.RemoveEnv("UNWANTED")
		adjust.AddAnnotation("by", p.name())
		adjust.AddMount(&api.Mount{Destination: "/from-plugin", Type: "bind", Source: annotations["source"], Options: []string{"bind", "ro"}})
		adjust.AddRlimit("RLIMIT_NOFILE", 321, 123)
		adjust.AddDevice(&api.LinuxDevice{Path: "/dev/from-plugin", Type: "c", Major: 1, Minor: 5})
		adjust.SetLinuxCPUShares(512)
		adjust.SetLinuxMemoryLimit(77 << 20)
		adjust.AddHooks(&api.Hooks{CreateContainer: []*api.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + annotations["source"] + "/hooked"}}}})
	}
	return adjust, nil, nil
}

func (p *plugin) name() string { return os.Getenv("NRI_PLUGIN_NAME") }

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	p.tell("created %s/%s by %s", pod.GetName(), container.GetName(), container.GetAnnotations()["by"])
	return nil
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	p.tell("start %s/%s", pod.GetName(), container.GetName())
	return nil
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	p.tell("started %s/%s %t", pod.GetName(), container.GetName(), container.GetPid() > 0)
	if pod.GetAnnotations()["later"] == p.name() {
		go func() {
			failed, err := p.stub.UpdateContainers(shares(container.GetId(), 555))
			p.tell("unsolicited %d %v", len(failed), err)
		}()
	}
	return nil
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container, resources *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.tell("update %s/%s %d", pod.GetName(), container.GetName(), resources.GetCpu().GetShares().GetValue())
	if p.name() != "installed" {
		return nil, nil
	}
	return shares(container.GetId(), 777), nil
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	p.tell("updated %s/%s", pod.GetName(), container.GetName())
	return nil
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	p.tell("stop %s/%s", pod.GetName(), container.GetName())
	return nil, nil
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	p.tell("remove %s/%s", pod.GetName(), container.GetName())
	return nil
}

func main() {
	socket := flag.String("socket", "", "where to connect, unless the runtime has started this")
	index := flag.String("index", "", "and as what")
	flag.Parse()
	p := &plugin{out: os.Stderr}
	options := []stub.Option{stub.WithOnClose(func() { os.Exit(3) })}
	if *socket != "" {
		options = append(options, stub.WithSocketPath(*socket), stub.WithPluginIdx(*index), stub.WithPluginName(p.name()))
	}
	var err error
	if p.stub, err = stub.New(p, options...); err == nil {
		err = p.stub.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
