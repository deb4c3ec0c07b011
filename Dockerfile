# `crosstrim serve` in a container.
#   docker build -t crosstrim .                                  with torch for the CPU
#   docker build -t crosstrim:cuda --build-arg DEVICE=cuda .     with torch and its libraries of CUDA
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/crosstrim
ENV PATH=/opt/crosstrim/bin:${PATH}
WORKDIR /source
COPY constraints.txt ./
# What PyPI calls torch is its build for CUDA.
RUN case "${DEVICE}" in \
        cpu) pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch ;; \
        cuda) pip install -c constraints.txt torch ;; \
        *) echo "DEVICE=${DEVICE} must be cpu or cuda." >&2; exit 2 ;; \
    esac
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip install -c constraints.txt '.[serve,json]'

FROM python:${PYTHON}
COPY --from=build /opt/crosstrim /opt/crosstrim
RUN groupadd --gid 10001 crosstrim \
    && useradd --uid 10001 --gid 10001 --no-create-home crosstrim \
    && install -d -o crosstrim -g crosstrim /models
# Models from the Hub are kept in the volume; whatever else is written goes to /tmp.
ENV PATH=/opt/crosstrim/bin:${PATH} HF_HOME=/models HOME=/tmp PYTHONUNBUFFERED=1
VOLUME /models
USER 10001:10001
EXPOSE 8000
# Alive, also while the model is being loaded; /ready says when requests are taken.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["crosstrim", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "mini"]
