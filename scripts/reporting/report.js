const tip = document.getElementById('tip');
const plain = v => Math.abs(v) >= 1e4 ? v.toLocaleString('en') : String(v);
const show = (event, text) => {
  tip.textContent = text; tip.style.visibility = 'visible';
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = Math.max(event.clientY - tip.offsetHeight - 10, 4) + 'px';
};
for (const svg of document.querySelectorAll('svg[data-series]')) {
  const series = JSON.parse(svg.dataset.series), cursor = svg.querySelector('.cursor');
  svg.onpointermove = event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = series.filter(s => s.points.length).map(s => [s.name, s.points.reduce(
      (a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)]);
    if (!near.length) return;
    const at = near.reduce((a, b) => Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a)[1];
    cursor.setAttribute('x1', at[0]); cursor.setAttribute('x2', at[0]);
    const here = near.filter(([, p]) => Math.abs(p[0] - at[0]) < 6);
    const lines = here.map(([name, p]) => `${name}: ${plain(p[3])}`);
    show(event, [`step ${plain(at[2])}, ${plain(at[1])} tokens`, ...lines].join('\n'));
  };
  svg.onpointerleave = () => { cursor.setAttribute('x1', -9); cursor.setAttribute('x2', -9); };
}
document.onpointermove = event => {
  const cell = event.target.closest('[data-tip]');
  if (cell) show(event, cell.dataset.tip);
  else if (!event.target.closest('svg[data-series]')) tip.style.visibility = 'hidden';
};
