# The trainer: trainer/, shared/ and configs/ with the extras `trainer` and `s3`, nothing of the server.
#
#   docker build --network host -f docker/trainer.Dockerfile -t spoke-trainer .
#   docker run --rm spoke-trainer --help
#
# Build arguments: TARGET (cpu, or gpu for torch's CUDA build), PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.
FROM python:3.11-slim

# Both images run as this user id, since they share the weight store's volume. A new named volume takes the
# owner of the folder that it is mounted over, so those folders have to be here.
RUN useradd --uid 10001 --create-home spoke && install -d -o spoke -g spoke /weights /runs

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
 && .ci/install venv/bin/python "$TARGET" ".[trainer,s3]" \
 && pip uninstall -q -y uv

# `spoke-server` is the server's command: without the server it could only end in a traceback.
COPY shared shared
COPY trainer trainer
RUN pip install -q --no-deps --force-reinstall . && rm -rf shared trainer build spoke.egg-info venv/bin/spoke-server

# Configurations are named by their path from here, as from a checkout.
COPY configs configs

USER spoke
ENTRYPOINT ["spoke"]
CMD ["--help"]
