# Everything that changes more often than the weights.
FROM base:1
LABEL "dev.coldstart.role"="server" \
      "dev.coldstart.device"="cpu" \
      "dev.coldstart.model.digest"="sha256:3f67e8a062fad2f11ffd6e53d1750404508f7e82e60f0016c0265bc64c5bf07f" \
      "dev.coldstart.quantization"="none" \
      "dev.coldstart.remote-code"="no" \
      "dev.coldstart.version"="0.1.0" \
      "dev.coldstart.vllm"="0.32.0" \
      "dev.coldstart.weights.key"="cb1a5695685d4be7a7acb0e0e9af325da3a64c3809b116364c2ace2729af7ed5" \
      "org.opencontainers.image.base.digest"="sha256:b" \
      "org.opencontainers.image.base.name"="base:1" \
      "org.opencontainers.image.licenses"="apache-2.0" \
      "org.opencontainers.image.revision"="aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
      "org.opencontainers.image.source"="hf://org/Tiny-1B" \
      "org.opencontainers.image.title"="org/Tiny-1B"
ENV DO_NOT_TRACK="1" HF_HUB_OFFLINE="1" HOME="/tmp" PYTHONPATH="/opt/coldstart" TORCH_COMPILE_DISABLE="1" TRANSFORMERS_OFFLINE="1" USER="coldstart" VLLM_ENABLE_V1_MULTIPROCESSING="0" VLLM_NO_USAGE_STATS="1"
USER root
# What the base's installer left uncompiled, as some do, would be compiled at every start too.
RUN ["python3", "-c", "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"]
COPY ["coldstart/", "/opt/coldstart/"]
# Whoever runs the image cannot write bytecode, and would compile the runtime again at every start.
RUN ["python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/opt/coldstart/runtime"]
USER 2000:0
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python3", "-m", "runtime", "health"]
ENTRYPOINT ["python3", "-m", "runtime"]
CMD []
