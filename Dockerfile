# docker build -t exo2ego .        (PyTorch for CPUs or another CUDA: --build-arg TORCH_INDEX=URL, see docs/install.md)
# docker run --rm -it --gpus all --ipc=host -v "$PWD/data:/exo2ego/data" -v "$PWD/runs:/exo2ego/runs" exo2ego stage1
FROM python:3.12-slim

# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends --yes make && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 exo2ego && mkdir /exo2ego && chown exo2ego /exo2ego
USER 1000
WORKDIR /exo2ego

# Packages first: this layer is kept as long as they stay the same.
COPY --chown=exo2ego pyproject.toml constraints.txt README.md LICENSE Makefile ./
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1
RUN mkdir datamodules lightning_modules && make setup TORCH_INDEX="$TORCH_INDEX"

COPY --chown=exo2ego . .
RUN touch .venv/installed
ENTRYPOINT ["make"]
CMD ["help"]
