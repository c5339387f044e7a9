// Pictures of the dashboard, one PNG of each row: npm run shoot -- DATA_FOLDER PICTURES_FOLDER
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { build } from 'esbuild';

const [data, pictures] = process.argv.slice(2);
const here = import.meta.dirname;
const dashboard = JSON.parse(readFileSync(join(here, '..', 'vllm-lego.json')));
const work = mkdtempSync(join(tmpdir(), 'dashboard-'));
mkdirSync(pictures, { recursive: true });

await build({
  entryPoints: [join(here, 'page.tsx')],
  bundle: true, minify: true, format: 'esm', jsx: 'automatic', outfile: join(work, 'page.js'),
  loader: { '.svg': 'dataurl', '.ttf': 'dataurl' },
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  banner: {
    js: `window.DASHBOARD = ${JSON.stringify(dashboard)};
         window.DATA = ${readFileSync(join(data, 'data.json'))};
         window.process ??= { env: {} };`,
  },
});
const script = readFileSync(join(work, 'page.js'), 'utf8').replaceAll('</script', '<\\/script');
const styles = readFileSync(join(work, 'page.css'), 'utf8');
writeFileSync(
  join(work, 'page.html'),
  `<!doctype html><meta charset="utf-8"><style>${styles}</style><body><div id="root"></div><script type="module">${script}</script>`,
);

// The first picture has the stats and the first row of graphs, each of the others one row.
const rows = dashboard.panels.filter(({ type }) => type === 'row');
const end = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
rows.forEach((row, index) => {
  const top = index ? row.gridPos.y : 0;
  const bottom = rows[index + 1]?.gridPos.y ?? end;
  const name = row.title.split(/[:?]/)[0].toLowerCase().replaceAll(' ', '-');
  execFileSync('chromium', [
    '--headless', '--no-sandbox', '--hide-scrollbars', '--disable-gpu', '--allow-file-access-from-files',
    '--virtual-time-budget=5000', `--user-data-dir=${join(work, 'profile')}`,
    `--window-size=1400,${(bottom - top) * 38 + 8}`, `--screenshot=${join(pictures, `${name}.png`)}`,
    `file://${join(work, 'page.html')}?top=${top}&bottom=${bottom}`,
  ], { stdio: ['ignore', 'inherit', process.env.VERBOSE ? 'inherit' : 'ignore'] });
});
rmSync(work, { recursive: true });
