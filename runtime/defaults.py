"""Seconds that the runtime keeps and the manifests of `coldstart manifest` allow for. No imports."""

# Go on serving after SIGTERM, readiness already off: orchestrators remove endpoints while they signal.
DRAIN_DELAY_SECONDS = 5.0
# What requests in flight get to finish after the delay.
DRAIN_TIMEOUT_SECONDS = 30.0
# How long a phase may go without a sign of progress before the start is given up.
PHASE_TIMEOUT_SECONDS = 600.0
# What the engine may take to release memory and exit, once no request is left.
TEARDOWN_SECONDS = 9.0
