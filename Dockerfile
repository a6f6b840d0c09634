# syntax=docker/dockerfile:1
# docker build -t weft:cpu .                          the tiny models on any machine
# docker build -t weft:cuda --build-arg DEVICE=cuda . for NVIDIA GPUs: torch 2.13 brings the libraries of CUDA
#                                                     13.0, the node a driver of 580 or newer (NVIDIA
#                                                     container toolkit); GPUs from Turing (7.5) on
#   --build-arg TORCH_INDEX=...                       another source of torch's wheels; all other packages are
#                                                     from pip's own index or the one that pip is set to
# docker run -p 127.0.0.1:8000:8000 -e WEFT_API_KEY=... -v weft-data:/outputs --shm-size 2g weft:cpu
#   --read-only --tmpfs /tmp                          works: it writes to /outputs, /models, /dev/shm, /tmp
#
# Layers from large and rarely changed to small and often changed: Python, compilers, torch with CUDA's
# libraries, all other packages, our files. An upgrade of Weft pulls the last ones. To start before the large ones are
# pulled, convert the image for a lazy snapshotter:
#   soci convert weft:cuda weft:cuda-soci             SOCI (Amazon's nodes have its snapshotter)
#   nerdctl image convert --estargz --oci weft:cuda weft:cuda-esgz      eStargz (stargz snapshotter)
ARG DEVICE=cpu
ARG PYTHON=3.12.12

FROM python:${PYTHON}-slim-trixie AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

FROM base AS wheels-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV TORCH_INDEX=$TORCH_INDEX

FROM base AS wheels-cuda
ARG TORCH_INDEX
ENV TORCH_INDEX=$TORCH_INDEX

# torch and what it brings, in an environment of its own: a layer that other packages leave as it is
# hadolint ignore=DL3006
FROM wheels-${DEVICE} AS torch
ENV PATH=/opt/torch/bin:$PATH
RUN python -m venv /opt/torch
WORKDIR /app
COPY constraints.txt ./
# torch first, its build for this device; all versions are those of constraints.txt
# hadolint ignore=DL3013,DL3042
RUN pip install --constraint constraints.txt --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --constraint constraints.txt torch

# everything else but our own code: built again only when a dependency changes
FROM torch AS dependencies
ENV PATH=/opt/venv/bin:$PATH
COPY tools/link_environment.py tools/link_environment.py
RUN python -m venv /opt/venv && python tools/link_environment.py /opt/venv /opt/torch
COPY pyproject.toml README.md ./
COPY deployments/__init__.py deployments/__init__.py
COPY serve_app/__init__.py serve_app/__init__.py
# hadolint ignore=DL3042
RUN pip install --constraint constraints.txt --editable '.[s3]'

FROM base AS device-cpu

# for `compile: true`: Triton builds its launchers with gcc and the headers that Python's image has, torch's
# compiler builds code for the host with g++
FROM base AS device-cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM device-${DEVICE} AS weft
RUN groupadd --gid 10001 weft \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin weft \
    && mkdir /outputs /models \
    && chown weft:weft /outputs /models
COPY --from=torch /opt/torch /opt/torch
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE serve_config.yaml ./
COPY configs configs
COPY models models
COPY examples examples
COPY serve_app serve_app
COPY deployments deployments
COPY tools/bytecode.py tools/bytecode.py
# written once, by root: the service's user may not, and every process would compile its imports again
RUN python -m tools.bytecode
ENV HOME=/tmp \
    WEFT_DATA_DIR=/outputs \
    HF_HOME=/models/huggingface \
    WEFT_MODEL_CACHE=/models/weft \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
VOLUME ["/outputs", "/models"]
EXPOSE 8000
# a new process; a model may take minutes to load
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=4 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
# WEFT_API_KEY must be set: beyond loopback every request needs a key
CMD ["weft", "serve", "--host", "0.0.0.0"]
