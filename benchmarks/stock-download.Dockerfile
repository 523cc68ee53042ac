# vLLM's own server that downloads its weights at every start, from the hub that HF_ENDPOINT names.
ARG BASE
FROM $BASE
ARG HF_ENDPOINT
ARG MODEL
ENV HOME=/tmp HF_ENDPOINT=$HF_ENDPOINT MODEL=$MODEL HF_HUB_DISABLE_XET=1 VLLM_NO_USAGE_STATS=1 \
    VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCH_COMPILE_DISABLE=1
USER 2000:0
EXPOSE 8000
# exec, so that SIGTERM reaches vLLM
ENTRYPOINT ["/bin/sh", "-c", "exec python3 -m vllm.entrypoints.openai.api_server --model $MODEL --enforce-eager --kv-cache-memory-bytes 2147483648 --max-model-len 2048"]
