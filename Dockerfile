# docker build --tag skyreels .
# docker run --rm --gpus all --shm-size 8g --user "$(id -u)" --volume skyreels:/cache --volume "$PWD:/work" \
#     --no-healthcheck skyreels generate --task_type t2v --prompt "FPS-24, A cat at a pool"
# docker run --init --gpus all --shm-size 8g --user "$(id -u)" --volume skyreels:/cache --volume "$PWD:/work" \
#     --publish 127.0.0.1:8000:8000 skyreels serve --host 0.0.0.0 --api_key api_key
# Checkpoints and caches live in /cache; input and output paths are relative to /work. A key file is readable for the
# user and has a key per line.
ARG TORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${TORCH_IMAGE}

# for --compile: triton builds its launchers with a C compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# the image's Python is the system's
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/skyreels
COPY requirements.txt requirements-web.txt ./
# torch comes with the image
RUN sed '/^torch==/d' requirements.txt > others.txt \
    && pip install --requirement others.txt --requirement requirements-web.txt
COPY LICENSE README.md pyproject.toml setup.py ./
COPY configs configs
COPY skyreels_v3 skyreels_v3
RUN pip install --no-deps --no-build-isolation .

# writable by any user id, so that with --user the outputs belong to whoever started the container
RUN useradd --no-log-init --create-home --uid 10001 skyreels \
    && install --directory --mode 1777 /cache /work
ENV HOME=/cache \
    USER=skyreels \
    HF_HOME=/cache/huggingface \
    SKYREELS_CACHE=/cache/skyreels
USER 10001
VOLUME /cache
WORKDIR /work
EXPOSE 8000
# of `skyreels serve`; http.client ignores proxies, and is there
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m CMD ["python3", "-c", "\
from http.client import HTTPConnection;\
server = HTTPConnection('127.0.0.1', 8000, timeout=5);\
server.request('GET', '/health');\
raise SystemExit(server.getresponse().status != 200)"]
ENTRYPOINT ["skyreels"]
CMD ["--help"]
