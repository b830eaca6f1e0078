// Curves answer the pointer and the arrow keys with the values at the nearest step.
const answer = (figure, svg, view) => {
  const cursor = svg.querySelector(".cursor");
  const tip = figure.querySelector(".tip");
  const xOf = new Map(view.series.flatMap((one) => one.points.map((point) => [point[0], point[3]])));
  const steps = [...xOf.keys()].sort((a, b) => a - b);
  let current = steps.length - 1;

  const nearest = (points, x) => points.reduce((best, point) => Math.abs(point[3] - x) < Math.abs(best[3] - x) ? point : best);
  const hide = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
  const show = (index) => {
    current = Math.max(0, Math.min(steps.length - 1, index));
    const x = xOf.get(steps[current]);
    const where = steps[current].toLocaleString("en");
    tip.replaceChildren(view.axis === "step" ? `step ${where}` : `${where} tokens`);
    for (const one of view.series) {
      const point = nearest(one.points, x);
      const row = document.createElement("div");
      const dot = document.createElement("i");
      const value = document.createElement("b");
      dot.className = `c${one.color}`;
      value.textContent = point[2];
      row.append(dot, one.label + (point[0] === steps[current] ? "" : ` @${point[0].toLocaleString("en")}`), value);
      tip.append(row);
    }
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const box = svg.getBoundingClientRect();
    const scale = box.width / view.width;
    const left = box.left - figure.getBoundingClientRect().left;
    const room = figure.clientWidth - tip.offsetWidth;
    const beside = left + x * scale + 12;
    tip.style.left = `${Math.max(0, beside > room ? Math.min(room, left + x * scale - tip.offsetWidth - 12) : beside)}px`;
    tip.style.top = `${box.top - figure.getBoundingClientRect().top + 6}px`;
    tip.style.visibility = cursor.style.visibility = "visible";
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * view.width / box.width;
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
};

// The columns and rows of a chart's CSV file: a row for each step or number of tokens.
const tableOf = (view) => {
  const values = view.series.map((one) => new Map(one.points.map((point) => [point[0], point[1]])));
  const places = [...new Set(values.flatMap((one) => [...one.keys()]))].sort((a, b) => a - b);
  return {
    columns: [view.axis, ...view.series.map((one) => one.label)],
    rows: places.map((place) => [place, ...values.map((one) => one.get(place) ?? "")]),
  };
};

// A picture that needs no style sheet: what the page's gives is written into it, the title and the legend are drawn.
const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "font-size", "font-family", "visibility"];
const pictureOf = (figure, svg, title) => {
  const copy = svg.cloneNode(true);
  const originals = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, index) => {
    const style = getComputedStyle(originals[index]);
    for (const name of STYLES) element.setAttribute(name, style.getPropertyValue(name));
    if (element.classList.contains("value")) element.setAttribute("text-anchor", "middle");
  });
  const style = getComputedStyle(figure);
  const add = (name, attributes, text = "") => {
    const element = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    copy.append(element);
    return element;
  };
  const line = 18, [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const legend = [...figure.querySelectorAll(".legend li")];
  const top = -line * (legend.length + 2);
  const font = { "font-size": 12, "font-family": style.fontFamily };
  add("text", { ...font, x: 0, y: top + 16, fill: style.color, "font-weight": "bold" }, title);
  legend.forEach((item, index) => {
    const y = top + line * (index + 1) + 16;
    const words = [...item.childNodes].map((node) => node.textContent.trim()).filter(Boolean);
    const dash = item.querySelector(".dashed") ? "5 4" : "none";
    const stroke = getComputedStyle(item).getPropertyValue("--c");
    add("path", { d: `M0 ${y - 4}h22`, stroke, "stroke-width": 2, "stroke-dasharray": dash });
    add("text", { ...font, x: 28, y, fill: style.color }, words.join(" "));
  });
  copy.setAttribute("viewBox", `-8 ${top - 4} ${width + 16} ${height - top + 8}`);
  copy.setAttribute("width", width + 16);
  copy.setAttribute("height", height - top + 8);
  const back = add("rect", { x: -8, y: top - 4, width: width + 16, height: height - top + 8, fill: style.backgroundColor });
  copy.prepend(back);
  return new XMLSerializer().serializeToString(copy);
};

const cell = (value) => typeof value === "number" ? String(value) : `"${String(value).replaceAll('"', '""')}"`;
const csvOf = (table) => [table.columns, ...table.rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};

for (const figure of document.querySelectorAll("figure[data-chart], figure[data-table]")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const pictures = [...figure.querySelectorAll("svg[role=img]")];
  if (data.views) pictures.forEach((svg, index) => answer(figure, svg, data.views[index]));
  const name = data.title.replace(/[^\w.-]+/g, "_");
  figure.querySelector(".downloads").addEventListener("click", (event) => {
    const kind = event.target.dataset.download;
    const shown = Math.max(0, pictures.findIndex((svg) => svg.checkVisibility()));
    if (kind === "svg") save(`${name}.svg`, "image/svg+xml", pictureOf(figure, pictures[shown], data.title));
    if (kind === "csv") save(`${name}.csv`, "text/csv", csvOf(data.table ?? tableOf(data.views[shown])));
  });
}
// One sound at a time.
document.addEventListener("play", (event) => {
  for (const sound of document.querySelectorAll("audio")) if (sound !== event.target) sound.pause();
}, true);
