"""Works while it holds an advisory lock of PostgreSQL, on the connection that it would write with.

    lock_holder.py NAME IP:PORT DATABASE_IP:PORT

GET /leader answers 200 while the lock is held, else 503; any other path answers its name. It speaks just enough of
PostgreSQL's protocol for that.
"""

import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOCK = 4711
TRY = 0.05

held = threading.Event()


class Database:
    def __init__(self, address):
        self.stream = socket.create_connection(address, timeout=5).makefile("rwb")
        parameters = b"user\0postgres\0database\0postgres\0\0"
        self.stream.write(struct.pack(">ii", 8 + len(parameters), 196608) + parameters)
        self.stream.flush()
        self.until_ready()

    def until_ready(self):
        """The rows of the answer, of one column each."""
        rows = []
        while True:
            kind, length = struct.unpack(">ci", self.read(5))
            body = self.read(length - 4)
            if kind == b"E":
                raise OSError(body.decode(errors="replace"))
            if kind == b"D":
                rows.append(body[6:].decode())
            if kind == b"Z":
                return rows

    def read(self, length):
        data = self.stream.read(length)
        if len(data) != length:
            raise OSError("the database closed the connection")
        return data

    def query(self, text):
        body = text.encode() + b"\0"
        self.stream.write(b"Q" + struct.pack(">i", 4 + len(body)) + body)
        self.stream.flush()
        return self.until_ready()


def hold(address):
    while True:
        try:
            database = Database(address)
            while database.query(f"SELECT pg_try_advisory_lock({LOCK})") != ["t"]:
                time.sleep(TRY)
            held.set()
            while True:
                database.query("SELECT 1")
                time.sleep(TRY)
        except OSError as error:
            print(error, file=sys.stderr)
        held.clear()
        time.sleep(TRY)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = name.encode()
        self.send_response(200 if self.path != "/leader" or held.is_set() else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def parse(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


name, own, database = sys.argv[1:]
threading.Thread(target=hold, args=[parse(database)], daemon=True).start()
ThreadingHTTPServer(parse(own), Answer).serve_forever()
