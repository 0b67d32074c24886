# medtl in a container: nothing but what requirements.lock names, no root, no telemetry, all state in one volume.
#   docker build -t medtl .
#   docker run --rm -v "$PWD/work:/workspace" -v /scans:/scans:ro medtl run /opt/medtl/configs/demo.yaml --set scans.source=/scans
FROM python:3.11-slim-bookworm AS builder
WORKDIR /build
COPY requirements.lock requirements-build.lock ./
RUN python -m venv /opt/venv && \
    /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY medtl medtl
COPY pipelines pipelines
COPY configs configs
RUN python -m venv /opt/build && \
    /opt/build/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r requirements-build.lock && \
    /opt/build/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /build/dist . && \
    /opt/venv/bin/python -m pip install --no-cache-dir --no-deps /build/dist/medtl-*.whl

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home medtl && mkdir /workspace && chown medtl:medtl /workspace
COPY --from=builder /opt/venv /opt/venv
COPY configs /opt/medtl/configs
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY=false \
    DO_NOT_TRACK=1
USER medtl
WORKDIR /workspace
VOLUME /workspace
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s CMD ["medtl", "--version"]
ENTRYPOINT ["medtl"]
CMD ["--help"]
