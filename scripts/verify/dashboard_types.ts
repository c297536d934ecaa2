// What Grafana's own types (npm: @grafana/schema) say of a dashboard with the panels that ours has, as JSON.
import type { Dashboard, Panel, RowPanel } from "@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen.d.ts";
import type * as heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen.d.ts";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts";
import type * as timeseries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts";

type Fields = NonNullable<Panel["fieldConfig"]>;

// There, options and fields of a panel are anything; here, what its kind has.
type PanelOf<Kind, Options, Custom> = Omit<Panel, "type" | "options" | "fieldConfig"> & {
  type: Kind;
  options: Partial<Options>;
  fieldConfig: Omit<Fields, "defaults"> & { defaults: Omit<Fields["defaults"], "custom"> & { custom?: Custom } };
  targets: { expr: string; format?: "heatmap"; legendFormat: string; refId: string }[];
};

type AnyPanel =
  | RowPanel
  | PanelOf<"heatmap", heatmap.Options, heatmap.FieldConfig>
  | PanelOf<"stat", stat.Options, never>
  | PanelOf<"timeseries", timeseries.Options, timeseries.FieldConfig>;

// JSON has strings where TypeScript has enums.
type Json<T> = T extends string ? `${T}` : T extends object ? { [Key in keyof T]: Json<T[Key]> } : T;

export type DashboardJson = Json<Omit<Dashboard, "panels"> & { panels: AnyPanel[] }>;
