# Everything that changes more often than the weights.
FROM coldstart/weights:fdc8b8124e78484b
LABEL "dev.coldstart.role"="server" \
      "dev.coldstart.device"="cuda" \
      "dev.coldstart.model.digest"="sha256:8e28aa5db341772ec32392f9fe1cd05b6841839733747558c9a57c38df3618fe" \
      "dev.coldstart.quantization"="none" \
      "dev.coldstart.version"="0.1.0" \
      "dev.coldstart.vllm"="0.32.0" \
      "org.opencontainers.image.base.digest"="sha256:b" \
      "org.opencontainers.image.base.name"="base:1" \
      "org.opencontainers.image.licenses"="apache-2.0" \
      "org.opencontainers.image.revision"="aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
      "org.opencontainers.image.source"="hf://org/Tiny-1B" \
      "org.opencontainers.image.title"="org/Tiny-1B"
ENV DO_NOT_TRACK="1" HF_HUB_OFFLINE="1" HOME="/tmp" PYTHONPATH="/opt/coldstart" TRANSFORMERS_OFFLINE="1" USER="coldstart" VLLM_NO_USAGE_STATS="1"
COPY ["coldstart/", "/opt/coldstart/"]
USER 2000:0
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python3", "-m", "runtime", "health"]
ENTRYPOINT ["python3", "-m", "runtime"]
CMD []
