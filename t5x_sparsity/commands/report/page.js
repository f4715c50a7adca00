"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const off = new Set();

  // '@ink' in a chart is the colour --ink of the page
  const themed = (value, css) => {
    if (typeof value === "string" && value[0] === "@") {
      const color = (name) => css.getPropertyValue("--" + name).trim();
      if (value !== "@heat") return color(value.slice(1));
      return [0, 1, 2, 3, 4].map((i) => [i / 4, color("heat" + i)]);
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "object" ? value.map((v) => themed(v, css)) : value;
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, css)]));
    }
    return value;
  };

  const draw = (chart) => {
    const css = getComputedStyle(document.documentElement);
    const at = document.getElementById(chart.id);
    const narrow = at.clientWidth < 520;
    const axis = {
      automargin: true, showgrid: true, gridcolor: "@line", linecolor: "@line", zeroline: false,
      title: { standoff: 8, font: { size: 12 } },
    };
    const names = chart.layout.meta && chart.layout.meta.long ? chart.layout.meta : null;
    const yaxis = { ...axis, ...chart.layout.yaxis };
    if (names) {
      yaxis.ticktext = narrow ? names.short : names.long;
      yaxis.tickfont = { size: narrow ? 10 : 11 };
    }
    const layout = {
      autosize: true, showlegend: false, hovermode: "x unified",
      margin: { l: 8, r: names ? 8 : 16, t: 10, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "@muted" },
      hoverlabel: { bgcolor: "@card", bordercolor: "@line", font: { color: "@ink", size: 12 }, namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "@muted", activecolor: "@ink" },
      // a finger that moves on a chart scrolls the page
      dragmode: touch ? false : "zoom",
      ...chart.layout,
      xaxis: { ...axis, showgrid: false, spikecolor: "@muted", spikethickness: 1, ticks: "outside", tickcolor: "@line", nticks: narrow ? 5 : 9, ...chart.layout.xaxis,
        title: { ...axis.title, ...chart.layout.xaxis.title } },
      yaxis,
    };
    const data = chart.data.map((t) => {
      const colorbar = t.colorbar && { ...t.colorbar, tickfont: { size: narrow ? 10 : 11 } };
      return { ...t, ...(colorbar && { colorbar }), visible: !off.has(String(t.meta)) };
    });
    Plotly.react(at, themed(data, css), themed(layout, css), {
      responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  };
  const drawAll = () => charts.forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });

  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.addEventListener("click", () => {
      const run = button.dataset.toggle;
      const shown = off.has(run);
      shown ? off.delete(run) : off.add(run);
      button.setAttribute("aria-pressed", shown);
      document.querySelectorAll(`[data-run="${run}"]`).forEach((e) => e.classList.toggle("off", !shown));
      drawAll();
    });
  }

  // Masks whose cells are shares are dim: the brightest cell of a weight gets the full colour.
  for (const card of document.querySelectorAll(".mask")) {
    const images = [...card.querySelectorAll("img.pixels")];
    Promise.all(images.map((i) => i.decode())).then(() => {
      const highest = Math.max(0, ...images.map(brightest));
      if (highest > 0 && highest < 255) {
        card.style.setProperty("--gain", 255 / highest);
        card.querySelector(".gain").textContent = ` Full colour is ${((100 * highest) / 255).toFixed(0)}% kept.`;
      }
    }, () => {});
  }
  function brightest(image) {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height).data.reduce((m, v, i) => (i % 4 ? m : Math.max(m, v)), 0);
  }

  const zoom = document.getElementById("zoom");
  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("click", () => {
      const image = button.querySelector("img"), big = zoom.querySelector("img");
      const room = Math.min(600, innerWidth * 0.94 - 40, innerHeight * 0.75);
      const scale = Math.max(1, Math.floor(room / Math.max(image.naturalWidth, image.naturalHeight)));
      big.src = image.src;
      big.width = image.naturalWidth * scale;
      big.style.setProperty("--gain", getComputedStyle(button.closest(".mask")).getPropertyValue("--gain") || 1);
      zoom.querySelector("p").textContent =
        `${button.closest(".mask").querySelector("h3").textContent}, ${button.textContent.trim()}`;
      zoom.showModal();
    });
  }
  zoom.addEventListener("click", () => zoom.close());
})();
