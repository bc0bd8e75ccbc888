"""Asks a runtime the same questions over connections that name its socket differently, and prints the answers.

No message classes: the few fields are read by hand, so that gRPC itself is all this needs.
"""

import sys

import grpc

# Longer than any answer takes on a busy machine.
PATIENCE = 60


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(data):
    """Numbers and contents of the fields that have a length; the others are passed over."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        value, at = varint(data, at)
        if key & 7 == 2:
            yield key >> 3, data[at : at + value]
            at += value


def texts(data, number):
    return [content.decode() for key, content in fields(data) if key == number]


def containers(answer):
    return [text for key, container in fields(answer) if key == 1 for text in texts(container, 1)]


def questions(way, channel):
    def call(name, request=b""):
        ask = channel.unary_unary("/runtime.v1.RuntimeService/" + name)
        return ask(request, timeout=PATIENCE)

    version = call("Version")
    listed = containers(call("ListContainers"))
    stream = channel.unary_stream("/runtime.v1.RuntimeService/StreamContainers")
    streamed = [id for answer in stream(b"", timeout=PATIENCE) for id in containers(answer)]
    try:
        call("ContainerStatus", b"\x0a\x06nobody")
        missing = "OK"
    except grpc.RpcError as error:
        missing = error.code().name
    words = [way, *texts(version, 2), *texts(version, 4)]
    words += ["containers=" + ",".join(listed), "streamed=" + ",".join(streamed), "missing=" + missing]
    print(*words)


def main(path):
    failed = False
    ways = {
        "address": ("unix://" + path, []),
        "short-address": ("unix:" + path, []),
        "path-as-authority": ("unix://" + path, [("grpc.default_authority", path)]),
        "encoded-authority": ("unix://" + path, [("grpc.default_authority", path.replace("/", "%2F"))]),
    }
    for way, (target, options) in ways.items():
        try:
            with grpc.insecure_channel(target, options=options) as channel:
                questions(way, channel)
        except grpc.RpcError as error:
            failed = True
            print(f"{way} failed: {error.code().name} {error.details()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
