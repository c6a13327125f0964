#!/usr/bin/env python3
"""A standard gRPC client (grpcio) against kakuri-cri-sim: many calls at a time on one connection.

Usage: grpcio_client.py SOCKET [PROTO]        PROTO defaults to proto/runtime/v1/api.proto of this checkout

The simulator must run without faults of its own making: `--fault-file FAULTS` is how this script makes them, and its path
comes in KAKURI_FAULT_FILE. Needs grpcio, protobuf, and a protoc: grpc_tools, or the program `protoc`.
The last line of a run that found nothing wrong is `grpcio: N checks passed`.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # Answers that are none are expected here.

import grpc  # noqa: E402

CHECKS = 0


def check(what, holds):
    """Counts a fact, or ends the run with it."""
    global CHECKS
    if not holds:
        sys.exit(f"grpcio: FAILED: {what}")
    CHECKS += 1


def compile_proto(proto, out):
    """Makes api_pb2.py out of the .proto, by whichever compiler there is."""
    args = [f"-I{proto.parent}", f"--python_out={out}", str(proto)]
    try:
        from grpc_tools import protoc
    except ImportError:
        if shutil.which("protoc") is None:
            sys.exit("grpcio: neither grpc_tools nor protoc is here")
        subprocess.run(["protoc", *args], check=True)
    else:
        if protoc.main(["protoc", *args]) != 0:
            sys.exit("grpcio: the .proto does not compile")
    sys.path.insert(0, str(out))
    import api_pb2

    return api_pb2


class Runtime:
    """CRI's methods on one channel, made from the service descriptors, so that no generated stubs are needed."""

    def __init__(self, channel, pb):
        for service in pb.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                answer = getattr(pb, method.output_type.name)
                make = channel.unary_stream if method.name == "GetContainerEvents" else channel.unary_unary
                path = f"/{service.full_name}/{method.name}"
                setattr(self, method.name, make(path, lambda m: m.SerializeToString(), answer.FromString))


def faults(*specs):
    """Replaces the simulator's faults."""
    path = pathlib.Path(os.environ["KAKURI_FAULT_FILE"])
    new = path.with_suffix(".tmp")
    new.write_text("".join(f"{spec}\n" for spec in specs))
    new.rename(path)


def error_of(call):
    """The status a call fails with."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def eventually(what, question, seconds=10):
    """Asks until the answer is yes."""
    end = time.monotonic() + seconds
    while not question():
        if time.monotonic() > end:
            check(what, False)
        time.sleep(0.01)
    check(what, True)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    socket = sys.argv[1].removeprefix("unix://")
    proto = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else pathlib.Path(__file__).parents[2] / "proto/runtime/v1/api.proto"
    with tempfile.TemporaryDirectory(prefix="kakuri-grpcio-") as out:
        pb = compile_proto(proto.resolve(), out)
        limits = [("grpc.max_receive_message_length", 16 << 20)]
        with grpc.insecure_channel(f"unix://{socket}", options=limits) as channel:
            run(channel, Runtime(channel, pb), pb, out)
        # Faults that end a connection get one of their own.
        with grpc.insecure_channel(f"unix://{socket}", options=[*limits, ("grpc.use_local_subchannel_pool", 1)]) as channel:
            endings(Runtime(channel, pb), pb)
    print(f"grpcio: {CHECKS} checks passed")


def run(channel, cri, pb, out):
    faults()
    check("Version names the simulator", cri.Version(pb.VersionRequest(), timeout=10).runtime_name == "kakuri-cri-sim")
    status = cri.Status(pb.StatusRequest(verbose=True), timeout=10)
    check("Status is ready", all(c.status for c in status.status.conditions) and len(status.status.conditions) == 2)
    check("Status lists handlers", {"runc", "edera"} <= {h.name for h in status.runtime_handlers})

    # A server stream beside unary calls on the same connection.
    events = cri.GetContainerEvents(pb.GetEventsRequest())
    events.initial_metadata()
    seen = []
    reader = threading.Thread(target=lambda: read(events, seen), daemon=True)
    reader.start()

    metadata = pb.PodSandboxMetadata(name="py", uid=f"uid-{os.getpid()}", namespace="default", attempt=0)
    label = {"made.by": f"grpcio-{os.getpid()}"}
    config = pb.PodSandboxConfig(metadata=metadata, log_directory=f"{out}/logs", labels=label)
    sandbox = cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config, runtime_handler="gvisor"), timeout=10).pod_sandbox_id
    code, words = error_of(lambda: cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config, runtime_handler="gvisor"), timeout=10))
    check("a sandbox's name is reserved", code == grpc.StatusCode.UNKNOWN and f'is reserved for "{sandbox}"' in words)
    container = cri.CreateContainer(
        pb.CreateContainerRequest(
            pod_sandbox_id=sandbox,
            config=pb.ContainerConfig(
                metadata=pb.ContainerMetadata(name="main"),
                image=pb.ImageSpec(image="localhost/busybox:1.35"),
                command=["sh", "-c", "echo hello; sleep 0.2; exit 7"],
                log_path="main/0.log",
            ),
            sandbox_config=config,
        ),
        timeout=10,
    ).container_id
    cri.StartContainer(pb.StartContainerRequest(container_id=container), timeout=10)

    def state():
        return cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container), timeout=10).status

    check("it runs", state().state == pb.CONTAINER_RUNNING)
    execution = cri.ExecSync(pb.ExecSyncRequest(container_id=container, cmd=["uname", "-r"], timeout=5), timeout=10)
    check("exec answers", (execution.stdout, execution.exit_code) == (b"4.4.0\n", 0))
    eventually("it ends", lambda: state().state == pb.CONTAINER_EXITED)
    check("its exit code is kept", (state().exit_code, state().reason) == (7, "Error"))
    check("it has a log", pathlib.Path(state().log_path).read_text().endswith(" stdout F hello\n"))
    listed = cri.ListPodSandbox(pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(label_selector=label)), timeout=10)
    check("lists select by label", [item.id for item in listed.items] == [sandbox])

    side_by_side(cri, pb)
    big(cri, pb)
    errors(channel, cri, pb)

    cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=10)
    cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=10)
    left = cri.ListContainers(pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=sandbox)), timeout=10)
    check("nothing is left", not left.containers)
    eventually("the stream saw the sandbox go", lambda: (sandbox, pb.CONTAINER_DELETED_EVENT) in seen)
    of_container = [kind for id, kind in seen if id == container]
    check("the stream saw all of the container, in order", of_container == [0, 1, 2, 3])
    events.cancel()
    reader.join(10)
    check("a cancelled stream ends", not reader.is_alive())


def read(events, seen):
    """Keeps what a stream brings, until it is cancelled."""
    try:
        for event in events:
            seen.append((event.container_id, event.container_event_type))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.CANCELLED, error


def side_by_side(cri, pb):
    """20 calls at a time on one channel, one of which hangs until its deadline."""
    faults("ListImages:hang*1", "Version:delay=100")
    with ThreadPoolExecutor(20) as pool:
        start = time.monotonic()
        hanging = pool.submit(error_of, lambda: cri.ListImages(pb.ListImagesRequest(), timeout=1.0))
        calls = [pool.submit(cri.Version, pb.VersionRequest(), timeout=10) for _ in range(19)]
        names = {call.result().runtime_name for call in calls}
        took = time.monotonic() - start
        check("19 slow calls run side by side", names == {"kakuri-cri-sim"} and took < 0.9)
        check("the hanging one meets its deadline", hanging.result()[0] == grpc.StatusCode.DEADLINE_EXCEEDED)
        check("and not before", 0.9 < time.monotonic() - start < 3)
    faults()


def big(cri, pb):
    """Answers beyond every flow-control window."""
    faults(f"Version:big={12 << 20}")
    answer = cri.Version(pb.VersionRequest(), timeout=30)
    check("12 MiB arrive whole", answer.runtime_name == "kakuri-cri-sim" and answer.ByteSize() > 12 << 20)
    with ThreadPoolExecutor(20) as pool:
        sizes = [call.result().ByteSize() for call in [pool.submit(cri.Version, pb.VersionRequest(), timeout=60) for _ in range(4)]]
        check("four times 12 MiB at a time, too", min(sizes) > 12 << 20)
    faults("Version:giant")
    check("17 MiB are too many", error_of(lambda: cri.Version(pb.VersionRequest(), timeout=30))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED)
    faults()
    answer = cri.Version(pb.VersionRequest(version="x" * (8 << 20)), timeout=30)
    check("a request of 8 MiB arrives", answer.runtime_name == "kakuri-cri-sim")
    code, words = error_of(lambda: cri.Version(pb.VersionRequest(version="x" * (17 << 20)), timeout=30))
    check("one of 17 MiB is refused", code == grpc.StatusCode.RESOURCE_EXHAUSTED and "received message larger" in words)


def errors(channel, cri, pb):
    """Statuses, and answers that are none."""
    bad = channel.unary_unary("/runtime.v1.RuntimeService/Nope")
    code, words = error_of(lambda: bad(b"", timeout=10))
    expect = "unknown method Nope for service runtime.v1.RuntimeService"
    check("an unknown method", (code, words) == (grpc.StatusCode.UNIMPLEMENTED, expect))
    bad = channel.unary_unary("/runtime.v9.RuntimeService/Version")
    check("an unknown service", error_of(lambda: bad(b"", timeout=10))[0] == grpc.StatusCode.UNIMPLEMENTED)
    bad = channel.unary_unary("/runtime.v1.RuntimeService/Version")
    check("a request that is no protobuf", error_of(lambda: bad(b"\xff\xff", timeout=10))[0] == grpc.StatusCode.INTERNAL)
    code, words = error_of(lambda: cri.ContainerStatus(pb.ContainerStatusRequest(container_id="nope"), timeout=10))
    expect = 'an error occurred when try to find container "nope": not found'
    check("NOT_FOUND in containerd's words", (code, words) == (grpc.StatusCode.NOT_FOUND, expect))
    faults("Version:error=FAILED_PRECONDITION,隔離 is 100% off\\n")
    code, words = error_of(lambda: cri.Version(pb.VersionRequest(), timeout=10))
    check("words beyond ASCII", (code, words) == (grpc.StatusCode.FAILED_PRECONDITION, "隔離 is 100% off\\n"))
    for spec, expect in [
        ("http=503", grpc.StatusCode.UNAVAILABLE),
        ("rst=2", grpc.StatusCode.INTERNAL),
        ("malformed", grpc.StatusCode.INTERNAL),
        ("no-status", grpc.StatusCode.UNKNOWN),
        ("rst=REFUSED_STREAM", grpc.StatusCode.UNAVAILABLE),
    ]:
        faults(f"Version:{spec}")
        code = error_of(lambda: cri.Version(pb.VersionRequest(), timeout=10))[0]
        check(f"{spec} is an error ({code})", code == expect)
    faults()


def endings(cri, pb):
    """Connections that end while they are in use."""
    faults("Version:drop*1", "Version:drop-after*1@1")
    for what in ["before", "after"]:
        code = error_of(lambda: cri.Version(pb.VersionRequest(), timeout=10, wait_for_ready=True))[0]
        check(f"a connection closed {what} the effect is an error", code == grpc.StatusCode.UNAVAILABLE)
    faults("Version:goaway*3")
    for _ in range(5):
        check("GOAWAY costs no call", cri.Version(pb.VersionRequest(), timeout=10, wait_for_ready=True).version == "0.1.0")
    faults()


if __name__ == "__main__":
    main()
