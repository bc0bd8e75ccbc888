// Asks a runtime the same questions over connections that name its socket differently, and prints the answers.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Longer than any answer takes on a busy machine.
const patience = time.Minute

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: cri-caller SOCKET")
		os.Exit(2)
	}
	path := os.Args[1]
	plain := grpc.WithTransportCredentials(insecure.NewCredentials())
	dialer := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	})
	failed := false
	ask := func(way string, connection *grpc.ClientConn, err error) {
		if err == nil {
			err = questions(way, connection)
		}
		if err != nil {
			failed = true
			fmt.Printf("%s failed: %v\n", way, err)
		}
	}
	connection, err := grpc.NewClient("unix://"+path, plain)
	ask("address", connection, err)
	connection, err = grpc.NewClient("passthrough:///"+path, plain, dialer)
	ask("passed-through", connection, err)
	// What clients did before there were addresses: the authority is the target, which is the path.
	connection, err = grpc.Dial(path, plain, dialer) //nolint:staticcheck // it is what is tested
	ask("bare-path", connection, err)
	connection, err = grpc.NewClient("passthrough:///socket", plain, dialer, grpc.WithAuthority(path))
	ask("path-as-authority", connection, err)
	if failed {
		os.Exit(1)
	}
}

func questions(way string, connection *grpc.ClientConn) error {
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	runtime := cri.NewRuntimeServiceClient(connection)
	version, err := runtime.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return err
	}
	listed, err := runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return err
	}
	var ids []string
	for _, container := range listed.Containers {
		ids = append(ids, container.Id)
	}
	streamed, err := stream(ctx, runtime)
	if err != nil {
		return err
	}
	_, err = runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: "nobody"})
	fmt.Printf("%s %s %s containers=%s streamed=%s missing=%s\n", way, version.RuntimeName, version.RuntimeApiVersion,
		strings.Join(ids, ","), strings.Join(streamed, ","), status.Code(err))
	return nil
}

func stream(ctx context.Context, runtime cri.RuntimeServiceClient) (ids []string, err error) {
	containers, err := runtime.StreamContainers(ctx, &cri.StreamContainersRequest{})
	if err != nil {
		return nil, err
	}
	for {
		answer, err := containers.Recv()
		if errors.Is(err, io.EOF) {
			return ids, nil
		}
		if err != nil {
			return nil, err
		}
		for _, container := range answer.Containers {
			ids = append(ids, container.Id)
		}
	}
}
