// Curves answer the pointer and the arrow keys with the values at the nearest step.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg.chart");
  const cursor = svg.querySelector(".cursor");
  const tip = figure.querySelector(".tip");
  const steps = [...new Set(chart.series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const xOf = new Map(chart.series.flatMap((one) => one.points.map((point) => [point[0], point[2]])));
  let current = steps.length - 1;

  const nearest = (points, x) => points.reduce((best, point) => Math.abs(point[2] - x) < Math.abs(best[2] - x) ? point : best);
  const hide = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
  const show = (index) => {
    current = Math.max(0, Math.min(steps.length - 1, index));
    const x = xOf.get(steps[current]);
    tip.replaceChildren(`step ${steps[current].toLocaleString("en")}`);
    for (const one of chart.series) {
      const point = nearest(one.points, x);
      const row = document.createElement("div");
      const dot = document.createElement("i");
      const value = document.createElement("b");
      dot.className = `c${one.color}`;
      value.textContent = point[1];
      row.append(dot, one.label + (point[0] === steps[current] ? "" : ` @${point[0].toLocaleString("en")}`), value);
      tip.append(row);
    }
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const box = svg.getBoundingClientRect();
    const scale = box.width / chart.width;
    const left = svg.offsetLeft || box.left - figure.getBoundingClientRect().left;
    const room = figure.clientWidth - tip.offsetWidth;
    const beside = left + x * scale + 12;
    tip.style.left = `${Math.max(0, beside > room ? Math.min(room, left + x * scale - tip.offsetWidth - 12) : beside)}px`;
    tip.style.top = `${box.top - figure.getBoundingClientRect().top + 6}px`;
    tip.style.visibility = cursor.style.visibility = "visible";
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.width / box.width;
    let best = 0;
    steps.forEach((step, index) => { if (Math.abs(xOf.get(step) - x) < Math.abs(xOf.get(steps[best]) - x)) best = index; });
    show(best);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", () => show(current));
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(current + move);
  });
}
// One sound at a time.
document.addEventListener("play", (event) => {
  for (const sound of document.querySelectorAll("audio")) if (sound !== event.target) sound.pause();
}, true);
