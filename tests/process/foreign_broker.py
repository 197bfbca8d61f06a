"""A broker that shares nothing with taskd but the published protocol: grpcio, `sentry-protos`, a list.

For the interpreter that has the published client. It behaves as the contract says that brokers do,
as strictly as that allows. It prints a JSON line for what happens: that it listens, each status it
was given, and whatever a worker of the protocol must not do.

python foreign_broker.py pull ACTIVATIONS            hands these out: a JSON list, each in base64
python foreign_broker.py push HOST:PORT ACTIVATIONS  pushes them to that worker, and refuses whoever fetches
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from sentry_protos.taskbroker.v1 import taskbroker_pb2 as pb
from sentry_protos.taskbroker.v1 import taskbroker_pb2_grpc as services

SECRET = os.environ["TASKD_TEST_SECRET"].encode()
APPLICATION = "kill-tests"
FAILURE, RETRY, COMPLETE = 3, 4, 5


def say(**what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def signature(path, body):
    return hmac.digest(SECRET, path.encode() + b":" + body, hashlib.sha256).hex()


class Broker(services.ConsumerServiceServicer):
    def __init__(self, hands_out):
        self.hands_out = hands_out
        self.waiting = []
        self.troubles = 2  # calls that are answered UNAVAILABLE at first
        self.lock = threading.Lock()

    def check(self, method, request, context):
        """A caller must sign. `request` is serialized again: with this schema, and no unknown field."""
        path = f"/sentry_protos.taskbroker.v1.ConsumerService/{method}"
        given = dict(context.invocation_metadata()).get("sentry-signature", "")
        if given != signature(path, request.SerializeToString(deterministic=True)):
            say(message="wrong", why=f"signature of {method}")
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication failed")
        if not context.time_remaining() or context.time_remaining() > 60:
            say(message="wrong", why=f"{method} without a deadline")
        with self.lock:
            self.troubles -= 1
            if self.troubles >= 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    def take(self, wanted):
        with self.lock:
            if not self.hands_out or not self.waiting:
                return None
            if not wanted.HasField("application") or wanted.application != APPLICATION:
                say(message="wrong", why=f"asked without its application: {wanted}")
                return None
            return self.waiting.pop(0)

    def apply(self, update):
        more = {name: getattr(update, name) for name in ("max_attempts", "delay_on_retry")}
        say(message="status", id=update.id, status=update.status, **more)

    def GetTask(self, request, context):
        self.check("GetTask", request, context)
        if not self.hands_out:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "push")
        task = self.take(request)
        if task is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "No pending activations")
        return pb.GetTaskResponse(task=task)

    def SetTaskStatus(self, request, context):
        self.check("SetTaskStatus", request, context)
        self.validate(request, context)
        self.apply(request)
        task = self.take(request.fetch_next_task) if request.HasField("fetch_next_task") else None
        return pb.SetTaskStatusResponse(task=task)

    def SetBatchActivationStatus(self, request, context):
        self.check("SetBatchActivationStatus", request, context)
        for update in request.updates:
            self.validate(update, context)
        for update in request.updates:
            self.apply(update)
        return pb.SetBatchActivationStatusResponse()

    def validate(self, update, context):
        if update.status not in (FAILURE, RETRY, COMPLETE):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"status {update.status}")


class Signing(grpc.UnaryUnaryClientInterceptor):
    def intercept_unary_unary(self, continuation, details, request):
        path = details.method if isinstance(details.method, str) else details.method.decode()
        header = ("sentry-signature", signature(path, request.SerializeToString()))
        return continuation(details._replace(metadata=[header]), request)


def push(address, tasks):
    channel = grpc.intercept_channel(grpc.insecure_channel(address), Signing())
    worker = services.WorkerServiceStub(channel)
    while tasks:
        try:
            worker.PushTask(pb.PushTaskRequest(task=tasks[0]), timeout=30, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                say(message="wrong", why=f"{error.code()} {error.details()}")
                time.sleep(0.5)
            continue
        tasks.pop(0)


def main():
    broker = Broker(hands_out=sys.argv[1] == "pull")
    server = grpc.server(ThreadPoolExecutor(16))
    services.add_ConsumerServiceServicer_to_server(broker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tasks = [pb.TaskActivation.FromString(base64.b64decode(raw)) for raw in json.loads(sys.argv[-1])]
    say(message="listens", port=port)
    if broker.hands_out:
        broker.waiting = tasks
    else:
        push(sys.argv[2], tasks)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
