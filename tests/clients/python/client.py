"""Calls Greeter/Hello with grpcio over xDS. tests/clients/README.md says what it does."""

import argparse
import collections
import json
import sys
import threading
import time

import grpc

args = argparse.ArgumentParser()
args.add_argument("--target", required=True)
args.add_argument("--concurrency", type=int, default=8)
args.add_argument("--rate", type=float, default=500)
args.add_argument("--fail-fast", action="store_true")
args = args.parse_args()

lock = threading.Lock()
by = collections.Counter()
errors = collections.Counter()
stop = threading.Event()


def encode(name):
    return b"\x0a" + bytes([len(name)]) + name.encode()


def decode(message):
    """The string fields of a message by number; every one of them is shorter than 128 bytes."""
    fields, at = {}, 0
    while at < len(message):
        end = at + 2 + message[at + 1]
        fields[message[at] >> 3] = message[at + 2 : end].decode()
        at = end
    return fields


def report():
    with lock:
        line = {"ok": sum(by.values()), "failed": sum(errors.values()), "by": dict(by), "errors": dict(errors)}
    print(json.dumps(line), flush=True)


def call_until_stopped(hello, first):
    pause = args.concurrency / args.rate
    due = time.monotonic() + pause * first / args.concurrency
    while not stop.wait(max(0, due - time.monotonic())):
        due = max(due + pause, time.monotonic())
        try:
            instance = hello("python", timeout=5, wait_for_ready=not args.fail_fast)[2]
            with lock:
                by[instance] += 1
        except grpc.RpcError as error:
            with lock:
                errors[f"{error.code().name}: {error.details()}"] += 1


with grpc.insecure_channel(args.target) as channel:
    hello = channel.unary_unary("/greeter.v1.Greeter/Hello", encode, decode)
    callers = [threading.Thread(target=call_until_stopped, args=(hello, n)) for n in range(args.concurrency)]
    for caller in callers:
        caller.start()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    while not stop.wait(0.1):
        report()
    for caller in callers:
        caller.join()
    report()
