# This project on a machine without a GPU: the tests, the quickstart, conversion and planning.
#     docker build -f docker/cpu.Dockerfile -t megatron-most-cpu .
#     docker run -it megatron-most-cpu make test
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace/megatron_most
# The packages in a layer of their own, which a change of the code leaves as it is.
COPY Makefile README.md constraints.txt pyproject.toml setup.py ./
COPY tools/find_python.sh tools/
COPY megatron_most/__init__.py megatron_most/
RUN make setup TORCH=cpu
COPY . .
RUN touch .venv/installed
