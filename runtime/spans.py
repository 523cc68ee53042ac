"""The phases of a start as OpenTelemetry spans, sent once by a process of its own when the server is ready.

`python3 -m runtime.spans` reads {"started", "ready", "start_id", "model", "phases"} from stdin. The exporter
is configured by the standard OTEL_* variables; the library is the one that vLLM brings. Nothing waits for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    return any(environ.get(name) for name in _ENDPOINTS)


def start_export(report: Mapping[str, Any]) -> None:
    """Start the exporting process. Raises OSError where none can be started."""
    process = subprocess.Popen([sys.executable, "-m", "runtime.spans"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    with process.stdin as pipe:  # smaller than a pipe's buffer, so this does not block
        pipe.write(json.dumps(report).encode())


def export(report: Mapping[str, Any]) -> None:
    """One span for the start, one below it for each phase. Raises ImportError without the SDK."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    if next((os.environ[name] for name in protocols if os.environ.get(name)), "") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    attributes = {"coldstart.start_id": report["start_id"], "coldstart.model": report["model"]}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = "coldstart"
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("coldstart")
    root = tracer.start_span("start", start_time=_nanoseconds(report["started"]))
    context = trace.set_span_in_context(root)
    for event in report["phases"]:
        span = tracer.start_span(event["phase"], context=context, start_time=_nanoseconds(event["start"]))
        span.set_attributes({"process.pid": event["pid"], "coldstart.process": event["process"]})
        if event["detail"]:
            span.set_attribute("coldstart.detail", event["detail"])
        span.end(end_time=_nanoseconds(event["end"]))
    root.end(end_time=_nanoseconds(report["ready"]))
    provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def main() -> int:
    from runtime import logs

    if logs.is_json():
        logs.configure("WARNING")
    try:
        export(json.load(sys.stdin))
    except Exception as error:
        logs.say(f"the spans of this start are not exported: {error!r}", "warning", process="spans")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
