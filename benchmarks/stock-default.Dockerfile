# vLLM's own server as it comes: compiled, not eager. Two arguments differ from its defaults, since with them it
# does not start in a plain container here: the engine core in process (the default executor wants more than the
# 64 MB of /dev/shm that `docker run` gives), and 2 GiB of KV cache (the default takes nearly all memory).
ARG WEIGHTS
FROM $WEIGHTS
ENV HOME=/tmp HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
USER 2000:0
EXPOSE 8000
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/SmolLM2-135M-Instruct", \
            "--served-model-name", "SmolLM2-135M-Instruct", \
            "--kv-cache-memory-bytes", "2147483648", "--max-model-len", "2048"]
