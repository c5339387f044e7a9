/** One row of the dashboard, drawn by Grafana's own components from answers of Prometheus. */
import {
  applyFieldOverrides, createTheme, dateTime, FieldConfigOptionsRegistry, FieldType,
  getFieldDisplayValues, getDisplayValueAlignmentFactors, identityOverrideProcessor, ThemeContext,
  toDataFrame, type DataFrame,
} from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries, VizRepeater } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import { MemoryRouter } from 'react-router-dom';
import 'uplot/dist/uPlot.min.css';

// Both are put here by shoot.mjs: the dashboard, and data.json of the end-to-end test.
declare const DASHBOARD: any, DATA: any;

const CELL = 38, GAP = 8; // Grafana's grid: rows of 30 px, 8 px between them
const theme = createTheme({ colors: { mode: 'light' } });
const timeRange = {
  from: dateTime(DATA.start * 1000), to: dateTime(DATA.end * 1000),
  raw: { from: dateTime(DATA.start * 1000), to: dateTime(DATA.end * 1000) },
};

// Grafana's panels register what can be configured of them; here it is whatever the dashboard sets.
const names = new Set<string>(DASHBOARD.panels.flatMap(({ fieldConfig }: any) =>
  !fieldConfig ? [] : [
    ...Object.keys(fieldConfig.defaults),
    ...Object.keys(fieldConfig.defaults.custom ?? {}).map((name) => `custom.${name}`),
    ...fieldConfig.overrides.flatMap(({ properties }: any) => properties.map(({ id }: any) => id)),
  ]));
names.delete('custom');
const registry = new FieldConfigOptionsRegistry(() =>
  [...names].map((id) => ({
    id, path: id.replace('custom.', ''), name: id, isCustom: id.startsWith('custom.'),
    process: identityOverrideProcessor, shouldApply: () => true,
    override: () => null, editor: () => null,
  } as any)));

function frames(panel: any): DataFrame[] {
  const times: number[] = [];
  for (let at = DATA.start; at <= DATA.end; at += 1) times.push(at);
  const data = panel.targets.flatMap((target: any) =>
    DATA.panels[panel.title][target.refId].map(({ metric, values }: any) => {
      const known = new Map(values.map(([at, value]: any) => [Math.round(at - DATA.start), Number(value)]));
      const name = target.legendFormat.replace(/{{(\w+)}}/g, (_: string, label: string) => metric[label]);
      return toDataFrame({
        refId: target.refId,
        fields: [
          { name: 'Time', type: FieldType.time, values: times.map((at) => at * 1000) },
          {
            name: 'Value', type: FieldType.number, labels: metric,
            config: { displayNameFromDS: name || panel.title },
            values: times.map((at) => known.get(Math.round(at - DATA.start)) ?? null),
          },
        ],
      });
    }));
  return applyFieldOverrides({
    data, fieldConfigRegistry: registry,
    fieldConfig: { ...panel.fieldConfig, defaults: { color: { mode: 'palette-classic' }, ...panel.fieldConfig.defaults } },
    replaceVariables: (text) => text, theme, timeZone: 'utc',
  });
}

function Stat({ panel, width, height }: any) {
  const { options } = panel;
  const values = () => getFieldDisplayValues({
    data: frames(panel), fieldConfig: panel.fieldConfig, reduceOptions: options.reduceOptions,
    replaceVariables: (text) => text, theme, timeZone: 'utc', sparkline: true,
  });
  return (
    <VizRepeater
      getValues={values} getAlignmentFactors={getDisplayValueAlignmentFactors} source={panel}
      renderCounter={0} width={width} height={height} orientation={options.orientation}
      renderValue={({ value, alignmentFactors, width, height, count }: any) => (
        <BigValue
          theme={theme} width={width} height={height} count={count} value={value.display}
          sparkline={value.sparkline && { ...value.sparkline, timeRange }}
          alignmentFactors={alignmentFactors} colorMode={options.colorMode ?? 'value'}
          graphMode={options.graphMode} justifyMode={options.justifyMode ?? 'auto'}
          textMode={options.textMode ?? 'auto'}
        />
      )}
    />
  );
}

function Panel({ panel, top, width }: any) {
  const { x, y, w, h } = panel.gridPos;
  const column = (width + GAP) / 24;
  return (
    <div style={{ position: 'absolute', left: x * column, top: (y - top) * CELL }}>
      <PanelChrome
        title={panel.title} description={panel.description}
        width={w * column - GAP} height={h * CELL - GAP}
      >
        {(innerWidth, innerHeight) =>
          panel.type === 'stat' ? (
            <Stat panel={panel} width={innerWidth} height={innerHeight} />
          ) : (
            <TimeSeries
              frames={frames(panel)} legend={panel.options.legend} timeRange={timeRange} timeZone="utc"
              width={innerWidth} height={innerHeight}
            />
          )
        }
      </PanelChrome>
    </div>
  );
}

function Page() {
  const wanted = new URLSearchParams(location.search);
  const [top, bottom] = [Number(wanted.get('top')), Number(wanted.get('bottom'))];
  const width = innerWidth - 2 * GAP;
  const shown = DASHBOARD.panels.filter(({ gridPos }: any) => gridPos.y >= top && gridPos.y < bottom);
  return (
    <div style={{ position: 'relative', margin: GAP }}>
      {shown.map((panel: any) =>
        panel.type === 'row' ? (
          <h4 key={panel.id} style={{ position: 'absolute', top: (panel.gridPos.y - top) * CELL + 4 }}>
            {panel.title}
          </h4>
        ) : (
          <Panel key={panel.id} panel={panel} top={top} width={width} />
        ))}
    </div>
  );
}

document.body.style.margin = '0';
document.body.style.background = theme.colors.background.canvas;
document.body.style.font = `14px ${theme.typography.fontFamily}`;
createRoot(document.getElementById('root')!).render(
  <MemoryRouter>
    <ThemeContext.Provider value={theme}>
      <GlobalStyles hackNoBackdropBlur isExtensionSidebarOpen={false} />
      <Page />
    </ThemeContext.Provider>
  </MemoryRouter>,
);
