# The environment of requirements.lock as an image, for KubeRay (jobs/rayjob.yaml) or any container:
#   docker build -t REGISTRY/bwlm:0.1.0 . && docker push REGISTRY/bwlm:0.1.0
FROM python:3.11-slim

# g++ for torch.compile; wget for KubeRay's health checks
RUN apt-get update -q && apt-get install -qy --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*

WORKDIR /bwlm
COPY requirements.lock .
RUN pip install --no-cache-dir -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY bwlm bwlm
COPY tasks tasks
COPY jobs jobs
COPY grids grids
RUN pip install --no-cache-dir --no-deps --editable .

RUN useradd --create-home --uid 1000 ray && mkdir -p /shared && chown -R ray /bwlm /shared
USER ray
ENV RAY_USAGE_STATS_ENABLED=0
