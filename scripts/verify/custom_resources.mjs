// Checks custom resources against the schemas of what reads them: node custom_resources.mjs MANIFEST.yaml...
// kubernetes-validate knows Kubernetes' own kinds only.
import { readFileSync } from "node:fs";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1";
import { ServiceMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import { loadAll } from "js-yaml";

const kinds = { ScaledObject, ServiceMonitor };
const found = process.argv.slice(2).flatMap((path) => loadAll(readFileSync(path, "utf8")));
const checked = found.filter((resource) => resource.kind in kinds);
for (const resource of checked) new kinds[resource.kind](resource).validate();
for (const kind in kinds) {
  if (!checked.some((resource) => resource.kind === kind)) throw new Error(`no ${kind} is in ${process.argv.slice(2)}`);
}
