# difftune on a CUDA machine:
#   docker build --tag difftune .
#   docker run --rm --gpus all --volume difftune-runs:/runs difftune demo --output_dir /runs/demo
#   docker run --rm --volume difftune-runs:/runs --entrypoint cat difftune /runs/demo/report.html > report.html
# A named volume belongs to the user of the image; a folder of the host is often root's, where that user cannot write.
# PyTorch's wheels bring their own CUDA libraries, so the small base image is enough.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/difftune

ENV PATH=/opt/difftune/bin:$PATH \
    HF_HOME=/home/difftune/.cache/huggingface \
    PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY difftune difftune
COPY guidance guidance
COPY rewards rewards
COPY solvers solvers
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[all]" && rm -rf /src/build

RUN useradd --create-home --uid 1001 difftune && mkdir /runs && chown difftune:difftune /runs
USER 1001
WORKDIR /home/difftune

ENTRYPOINT ["difftune"]
CMD ["doctor"]
