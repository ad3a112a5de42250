# The pipeline with all it needs, models included, as one image: docs/containers.md.
#   docker build -t nuclei .
# Another base with Python 3.11 or newer: --build-arg PYTHON=IMAGE
ARG PYTHON=python:3.12-slim
FROM ${PYTHON}

# Whoever it runs as need not exist in the image: what libraries keep in the home folder goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp

WORKDIR /opt/nuclei
COPY envs envs
RUN python3 -m venv /opt/venv && pip install --quiet --no-cache-dir --no-deps -r envs/requirements.lock
COPY . .
RUN pip install --quiet --no-cache-dir --no-deps --no-build-isolation --editable .

WORKDIR /work
ENTRYPOINT ["snakemake", "--snakefile", "/opt/nuclei/Snakefile"]
CMD ["--help"]
