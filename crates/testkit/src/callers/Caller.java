import io.grpc.CallOptions;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.MethodDescriptor;
import io.grpc.MethodDescriptor.MethodType;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.netty.channel.EventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.epoll.EpollDomainSocketChannel;
import io.grpc.netty.shaded.io.netty.channel.epoll.EpollEventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.unix.DomainSocketAddress;
import io.grpc.stub.ClientCalls;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/**
 * Asks a runtime the same questions over connections that name its socket differently, and prints the answers.
 *
 * <p>No message classes: the few fields are read by hand, so that gRPC itself is all this needs.
 */
public final class Caller {
    /** Longer than any answer takes on a busy machine. */
    private static final long PATIENCE_S = 60;

    public static void main(String[] arguments) {
        String path = arguments[0];
        EventLoopGroup group = new EpollEventLoopGroup(1);
        Map<String, ManagedChannelBuilder<?>> ways = new LinkedHashMap<>();
        ways.put("address", Grpc.newChannelBuilder("unix://" + path, InsecureChannelCredentials.create()));
        ways.put("short-address", Grpc.newChannelBuilder("unix:" + path, InsecureChannelCredentials.create()));
        ways.put("domain-socket", domainSocket(path, group));
        ways.put("path-as-authority", domainSocket(path, group).overrideAuthority(path));
        boolean failed = false;
        for (Map.Entry<String, ManagedChannelBuilder<?>> way : ways.entrySet()) {
            try {
                ManagedChannel channel = way.getValue().build();
                ask(way.getKey(), channel);
                channel.shutdownNow();
            } catch (RuntimeException error) {
                failed = true;
                System.out.println(way.getKey() + " failed: " + error);
            }
        }
        group.shutdownGracefully(0, 0, TimeUnit.SECONDS);
        System.exit(failed ? 1 : 0);
    }

    private static NettyChannelBuilder domainSocket(String path, EventLoopGroup group) {
        return NettyChannelBuilder.forAddress(new DomainSocketAddress(path))
                .channelType(EpollDomainSocketChannel.class)
                .eventLoopGroup(group)
                .usePlaintext();
    }

    private static void ask(String way, ManagedChannel channel) {
        byte[] version = call(channel, "Version", new byte[0]);
        List<String> listed = containers(call(channel, "ListContainers", new byte[0]));
        List<String> streamed = new ArrayList<>();
        Iterator<byte[]> answers = ClientCalls.blockingServerStreamingCall(
                channel, method("StreamContainers", MethodType.SERVER_STREAMING), options(), new byte[0]);
        answers.forEachRemaining(answer -> streamed.addAll(containers(answer)));
        Status.Code missing = Status.Code.OK;
        try {
            call(channel, "ContainerStatus", new byte[] {0x0a, 6, 'n', 'o', 'b', 'o', 'd', 'y'});
        } catch (StatusRuntimeException error) {
            missing = error.getStatus().getCode();
        }
        List<String> words = new ArrayList<>(List.of(way));
        words.addAll(texts(version, 2));
        words.addAll(texts(version, 4));
        words.add("containers=" + String.join(",", listed));
        words.add("streamed=" + String.join(",", streamed));
        words.add("missing=" + missing);
        System.out.println(String.join(" ", words));
    }

    private static byte[] call(ManagedChannel channel, String name, byte[] request) {
        return ClientCalls.blockingUnaryCall(channel, method(name, MethodType.UNARY), options(), request);
    }

    private static CallOptions options() {
        return CallOptions.DEFAULT.withDeadlineAfter(PATIENCE_S, TimeUnit.SECONDS);
    }

    private static MethodDescriptor<byte[], byte[]> method(String name, MethodType type) {
        Bytes bytes = new Bytes();
        return MethodDescriptor.newBuilder(bytes, bytes)
                .setFullMethodName("runtime.v1.RuntimeService/" + name)
                .setType(type)
                .build();
    }

    /** Messages as they are. */
    private static final class Bytes implements MethodDescriptor.Marshaller<byte[]> {
        @Override
        public InputStream stream(byte[] message) {
            return new ByteArrayInputStream(message);
        }

        @Override
        public byte[] parse(InputStream stream) {
            try {
                return stream.readAllBytes();
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }

    private static List<String> containers(byte[] answer) {
        List<String> ids = new ArrayList<>();
        fields(answer, 1).forEach(container -> ids.addAll(texts(container, 1)));
        return ids;
    }

    private static List<String> texts(byte[] message, int number) {
        List<String> texts = new ArrayList<>();
        fields(message, number).forEach(content -> texts.add(new String(content, StandardCharsets.UTF_8)));
        return texts;
    }

    /** Contents of the fields with a number that have a length; the others are passed over. */
    private static List<byte[]> fields(byte[] message, int number) {
        List<byte[]> contents = new ArrayList<>();
        ByteBuffer left = ByteBuffer.wrap(message);
        while (left.hasRemaining()) {
            long key = varint(left);
            long value = varint(left);
            if ((key & 7) == 2) {
                byte[] content = new byte[(int) value];
                left.get(content);
                if (key >> 3 == number) {
                    contents.add(content);
                }
            }
        }
        return contents;
    }

    private static long varint(ByteBuffer from) {
        long value = 0;
        for (int shift = 0; ; shift += 7) {
            byte next = from.get();
            value |= (long) (next & 0x7f) << shift;
            if (next >= 0) {
                return value;
            }
        }
    }
}
