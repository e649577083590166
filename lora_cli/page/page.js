// Hovering over a picture names the values nearest to the pointer; without this the page is whole as well.
"use strict";
const box = document.createElement("div");
box.className = "hover";
box.hidden = true;
document.body.append(box);

for (const svg of document.querySelectorAll(".chart svg[data-x]")) {
  const series = [...svg.querySelectorAll(".series")].map((group) => ({
    name: group.dataset.name,
    values: group.dataset.values.split(";"),
    spots: group.dataset.spots.split(";").map((spot) => spot.split(",").map(Number)),
  })).filter((one) => one.values[0]);
  if (!series.length) continue;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "pointer");
  svg.append(line);

  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const nearest = (one) => one.spots.reduce(
      (best, spot, number) => Math.abs(spot[0] - at.x) < Math.abs(one.spots[best][0] - at.x) ? number : best, 0);
    const found = series.map((one) => ({ one, number: nearest(one) }));
    const x = found.map(({ one, number }) => one.spots[number][0])
      .reduce((best, each) => Math.abs(each - at.x) < Math.abs(best - at.x) ? each : best);
    for (const end of ["x1", "x2"]) line.setAttribute(end, x);
    line.setAttribute("y1", 20);
    line.setAttribute("y2", 216);
    box.replaceChildren(...found.map(({ one, number }) => {
      const [place, value] = one.values[number].split(":");
      const row = document.createElement("div");
      row.textContent = `${one.name}  ${value}  (${svg.dataset.x} ${place})`;
      return row;
    }));
    box.hidden = false;
    const right = event.clientX + 14 + box.offsetWidth > document.documentElement.clientWidth;
    box.style.setProperty("left", `${Math.max(4, right ? event.clientX - 14 - box.offsetWidth : event.clientX + 14)}px`);
    box.style.setProperty("top", `${event.clientY + 14}px`);
  };
  const hide = () => { box.hidden = true; line.setAttribute("y2", 20); };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
