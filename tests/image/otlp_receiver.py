"""Runs inside the image: an OTLP/HTTP receiver on loopback that writes the spans it gets to a file."""

import gzip
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            {
                "name": span.name,
                "is_root": not span.parent_span_id,
                "start": span.start_time_unix_nano / 1e9,
                "end": span.end_time_unix_nano / 1e9,
                "resource": {a.key: a.value.string_value for a in resource.resource.attributes},
            }
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()
        with open("/tmp/spans.json", "w") as file:  # noqa: PTH123
            json.dump(spans, file)

    def log_message(self, format: str, *args: object) -> None:
        pass


HTTPServer(("127.0.0.1", 4318), Handler).serve_forever()
