# vLLM's own server on the same base and weights, with the same engine arguments as our CPU images: what
# differs is the runtime alone. In-process engine core, because the default wants more /dev/shm than
# `docker run` gives; no network, no statistics, so that nothing is waited for.
ARG WEIGHTS
FROM $WEIGHTS
ENV HOME=/tmp HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCH_COMPILE_DISABLE=1
USER 2000:0
EXPOSE 8000
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/SmolLM2-135M-Instruct", \
            "--served-model-name", "SmolLM2-135M-Instruct", "--enforce-eager", \
            "--kv-cache-memory-bytes", "2147483648", "--max-model-len", "2048"]
