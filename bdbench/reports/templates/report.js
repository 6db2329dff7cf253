"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const dialog = document.getElementById("details");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  /** An element with attributes and children; text is only ever set as text. */
  const make = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };
  const say = (text) => { document.getElementById("said").textContent = text; };
  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const grouped = (value) => Math.round(value).toLocaleString("en");

  // Charts

  const library = (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(make("script", {}, await new Response(stream).text()));
    return window.vegaEmbed;
  })();

  const colour = (name) => {
    const probe = document.body.appendChild(make("span", { style: `color:var(--${name})` }));
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const config = () => {
    const [ink, muted, line] = ["ink", "muted", "line"].map(colour);
    const text = { labelColor: muted, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
      axis: { ...text, gridColor: line, domainColor: line, tickColor: line, gridOpacity: 0.7 },
      legend: { ...text, symbolBaseFillColor: muted, symbolBaseStrokeColor: muted, orient: "bottom", columns: innerWidth < 500 ? 3 : 5, symbolLimit: 40, labelLimit: 150 },
      range: { category: isDark()
        ? ["#9aa4b2", "#ffb454", "#6cc7f5", "#3ddba8", "#f7e463", "#5b9cf0", "#ff8a5c", "#e59bd0", "#c9b6ff", "#a0d468"]
        : ["#4d5560", "#c77700", "#2b8fc4", "#008060", "#9c8a00", "#0059a3", "#c2410c", "#a8467f", "#6b4fc0", "#4f7a1c"] },
    };
  };

  const drawn = new Map();
  const draw = async (place, name, datasets, change = (spec) => spec) => {
    drawn.set(place, () => draw(place, name, datasets, change));
    try {
      const embed = await library;
      const spec = change({ ...structuredClone(data.charts[name]), datasets });
      const result = await embed(place, spec, { actions: false, renderer: "svg", config: config() });
      result.view.addEventListener("click", (_, item) => {
        if (item && item.datum && item.datum.place !== undefined) open(item.datum.place);
      });
    } catch (error) {
      place.replaceChildren(make("p", { class: "note" }, "This browser cannot draw the charts; the tables hold the numbers."));
      if (!(error instanceof ReferenceError)) throw error;
    }
  };
  const redraw = () => {
    for (const [place, again] of drawn) place.isConnected ? again() : drawn.delete(place);
  };

  const detection = (places) => places.flatMap((place) => data.cells[place].runs.flatMap((run) =>
    (data.runs[run].detection || []).map((tpr, index) => ({
      tpr, fpr: data.fpr[index], run, seed: data.rows[run].seed,
      attack: data.cells[place].attack, defense: data.cells[place].defense,
    }))));

  /** Charts are drawn when they come near the window: a large report opens at once. */
  const waiting = new Map();
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) {
      watcher.unobserve(target);
      waiting.get(target)();
    }
  }, { rootMargin: "300px" });

  /** More kinds of dashes than this are not told apart. */
  const DASHES = 5;

  /** Colours are the same all over the page; a legend names what its own chart has. */
  const legendOf = (spec, shown) => {
    for (const channel of ["stroke", "fill", "shape", "color"]) {
      const scaled = spec.encoding[channel];
      if (scaled && scaled.field === "defense")
        scaled.legend = { ...scaled.legend, values: scaled.scale.domain.filter((defense) => shown.has(defense)) };
    }
  };

  const drawMatrix = (section) => {
    const places = [...section.querySelectorAll("[data-cell]")].map((button) => Number(button.dataset.cell));
    const cells = places.map((place) => ({
      ...data.cells[place], place, mebibytes: data.cells[place].peak_memory_bytes / 2 ** 20,
    }));
    const scored = places.filter((place) => data.cells[place].runs.some((run) => data.runs[run].detection));
    for (const place of section.querySelectorAll("[data-chart]")) {
      const name = place.dataset.chart;
      if (name === "detection" && !scored.length) {
        place.closest("figure").remove();
        continue;
      }
      const datasets = () => (name === "detection" ? { detection: detection(scored) } : { cells });
      const few = new Set(scored.map((scores) => data.cells[scores].attack)).size <= DASHES;
      const shown = (name === "detection" ? scored : places).map((cell) => data.cells[cell].defense);
      waiting.set(place, () => draw(place, name, datasets(), (spec) => {
        if (!few) delete spec.encoding.strokeDash;
        legendOf(spec, new Set(shown));
        return spec;
      }));
      watcher.observe(place);
    }
  };

  // Sorting

  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, column) => {
      const cell = row.cells[column];
      const raw = cell.dataset[root.dataset.metric] ?? cell.dataset.sort ?? cell.textContent.trim();
      const value = raw === "" || Number.isNaN(Number(raw)) ? null : Number(raw);
      return column > 0 && (value !== null || cell.dataset.sort !== undefined || cell.dataset.asr !== undefined) ? value : raw;
    };
    heads.forEach((head, column) => head.querySelector(".sort")?.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const missing = (value) => value === null || value === "·not run" || value === "–";
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      rows.sort(([one], [other]) => {
        if (missing(one) || missing(other)) return missing(one) - missing(other);
        const order = typeof one === "number" && typeof other === "number" ? one - other
          : String(one).localeCompare(String(other), "en", { numeric: true });
        return rising ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
      say(`sorted by ${head.querySelector(".sort").textContent}, ${rising ? "ascending" : "descending"}`);
    }));
  };

  // A cell

  const rate = ([heading, name]) => [
    heading,
    (row) => row[name] === null ? "–" : `${number(row[name])} [${number(row[`${name}_low`])}, ${number(row[`${name}_high`])}]`,
    (row) => row[name],
    (row) => row[`${name}_n`] === null ? "" : `n = ${grouped(row[`${name}_n`])}`,
  ];
  const RUN_COLUMNS = [
    ["seed", (row) => String(row.seed), (row) => row.seed],
    ...[["BA", "ba"], ["ASR", "asr"]].map(rate),
    ["BA change", (row) => signed(row.ba_change), (row) => row.ba_change],
    ["ASR change", (row) => signed(row.asr_change), (row) => row.asr_change],
    ...[["floor", "floor"], ["RA", "ra"], ["target recall", "target_recall"]].map(rate),
    ["DER", (row) => number(row.der), (row) => row.der],
    ["AUROC", (row) => number(row.auroc), (row) => row.auroc],
    ["set aside: precision", (row) => number(row.detection_precision), (row) => row.detection_precision],
    ["recall", (row) => number(row.detection_recall), (row) => row.detection_recall],
    ["seconds", (row) => grouped(row.seconds), (row) => row.seconds],
    ["peak MiB", (row) => grouped(row.peak_memory_bytes / 2 ** 20), (row) => row.peak_memory_bytes],
  ];

  const runTable = (rows) => {
    const columns = RUN_COLUMNS.filter(([, , value]) => rows.some((row) => value(row) !== null));
    const head = make("tr", {}, ...columns.map(([heading]) =>
      make("th", { scope: "col", "aria-sort": "none" }, make("button", { type: "button", class: "sort" }, heading))));
    const body = rows.map((row) => make("tr", {}, ...columns.map(([, text, value, count], column) => column === 0
      ? make("th", { scope: "row" }, text(row))
      : make("td", { "data-sort": value(row) ?? "" }, text(row),
          count ? make("small", {}, make("br"), count(row)) : null))));
    const table = make("table", { class: "plain sortable" },
      make("caption", {}, "One line a run; in brackets Wilson's 95 % interval over the n test images."),
      make("thead", {}, head), make("tbody", {}, ...body));
    sortable(table);
    return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Runs of this cell" }, table);
  };

  /** What each run found, and the settings that its method chose from, a column a run. */
  const findings = (places) => {
    const told = places.map((place) => [`seed ${data.rows[place].seed}`, data.runs[place]]);
    const words = told.filter(([, run]) => Object.keys(run.findings).length).map(([seed, run]) => {
      const list = make("dl", { class: "words" });
      for (const [name, text] of Object.entries(run.findings)) list.append(make("dt", {}, name), make("dd", {}, text));
      return make("article", {}, make("h4", {}, seed), list);
    });
    const chose = told.filter(([, run]) => run.sweep);
    if (!chose.length) return words;
    const settings = [...new Set(chose.flatMap(([, run]) => run.sweep[0].map(([setting]) => setting)))];
    const cellOf = (run, wanted) => {
      const [, accuracy, remark] = run.sweep[0].find(([setting]) => setting === wanted) || [wanted, "–", ""];
      return make("td", remark === "chosen" ? { class: "chosen" } : {}, accuracy, make("small", {}, make("br"), remark || "\u00a0"));
    };
    const table = make("table", { class: "plain" },
      make("caption", {}, "Settings that were tried, from the weakest repair to the strongest",
        ...chose.flatMap(([seed, run]) => [make("br"), `${seed} ${run.sweep[1]}`])),
      make("thead", {}, make("tr", {}, ...["setting", ...chose.map(([seed]) => seed)].map((heading) => make("th", { scope: "col" }, heading)))),
      make("tbody", {}, ...settings.map((setting) => make("tr", {},
        make("th", { scope: "row" }, setting), ...chose.map(([, run]) => cellOf(run, setting))))));
    return [make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Settings that were tried" }, table), ...words];
  };

  const copy = (text, button) => {
    const done = () => { button.textContent = "Copied"; say("copied"); };
    const area = dialog.appendChild(make("textarea"));
    area.value = text;
    area.select();
    if (document.execCommand("copy")) done();
    area.remove();
    button.focus();
  };

  const runArticle = (run, row) => {
    const facts = make("dl", { class: "words" });
    const ids = { "dataset": row.dataset_id, model: row.model_id, evaluation: row.evaluation_id, path: row.path };
    for (const [name, value] of Object.entries({ ...run.facts, ...ids }))
      facts.append(make("dt", {}, name), make("dd", {}, String(value)));
    const article = make("article", {}, make("h4", {}, `Seed ${row.seed}`),
      ...run.missing.map((line) => make("p", { class: "note" }, line)));
    if (run.commands.length) {
      const text = run.commands.join("\n");
      const button = make("button", { type: "button", class: "copy", "aria-label": `Copy the commands of seed ${row.seed}` }, "Copy");
      button.addEventListener("click", () => copy(text, button));
      article.append(make("pre", { tabindex: "0", "aria-label": "Commands that reproduce it" }, text), button);
    }
    article.append(make("details", {}, make("summary", {}, "Manifest"), facts));
    return article;
  };

  const open = (place) => {
    const cell = data.cells[place];
    const rows = cell.runs.map((run) => data.rows[run]);
    const close = make("button", { type: "button", class: "close", "aria-label": "Close" }, "✕");
    close.addEventListener("click", () => dialog.close());
    const marks = [...cell.marks].map((mark) => {
      const marked = rows.filter((row) => row.marks.includes(mark)).map((row) => row.seed);
      const which = marked.length < rows.length ? ` (seed ${marked.join(", ")})` : "";
      return make("p", { class: "note" }, data.marks[mark] + which);
    });
    const phases = [...new Set(cell.runs.flatMap((run) => Object.keys(data.runs[run].history)))];
    const losses = phases.map((phase) => {
      const told = cell.runs.map((run) => [data.rows[run].seed, ...(data.runs[run].history[phase] || ["epoch", [], []])]);
      const values = told.flatMap(([seed, , counts, values]) => counts.map((count, index) => ({ count, loss: values[index], seed })));
      return [phase, told.every(([, unit]) => unit === "step") ? "step" : "epoch", values];
    });
    const charts = losses.map(([phase, unit, values]) => {
      const chart = make("div", { class: "chart", role: "img", "aria-label": `Loss over the ${unit}s of phase ${phase}` });
      return [make("figure", {}, make("figcaption", {}, make("b", {}, phase)), chart), chart, values, unit];
    });
    const judged = [...new Set(cell.runs.flatMap((run) => Object.keys(data.runs[run].rounds)))].map((phase) => {
      const values = cell.runs.flatMap((run) => Object.entries(data.runs[run].rounds[phase] || {}).flatMap(([metric, [epochs, shares]]) =>
        epochs.map((epoch, index) => ({ epoch, value: shares[index], metric, seed: data.rows[run].seed }))));
      const chart = make("div", { class: "chart", role: "img", "aria-label": `What would be set aside after each epoch of phase ${phase}: precision, recall and false alarms` });
      return [make("figure", {}, make("figcaption", {}, make("b", {}, phase), ": would be set aside"), chart), chart, values];
    });
    const found = findings(cell.runs);
    const curves = detection([place]);
    const roc = make("div", { class: "chart", role: "img", "aria-label": "ROC curve of every seed" });
    dialog.replaceChildren(
      make("header", {},
        make("div", {},
          make("h2", { id: "details-title" }, `${cell.attack} × ${cell.defense}`),
          make("p", { class: "muted" }, `${cell.dataset} · ${cell.model} · preset ${cell.preset} · ${rows.length} ${rows.length === 1 ? "run" : "runs"}`)),
        close),
      ...marks,
      make("h3", {}, "Runs"), runTable(rows),
      ...(found.length ? [make("h3", {}, "Findings"), ...found] : []),
      ...(charts.length || judged.length ? [make("h3", {}, judged.length ? "Loss, and what would be set aside" : "Loss"),
        make("div", { class: "losses" }, ...[...charts, ...judged].map(([figure]) => figure))] : []),
      ...(curves.length ? [make("h3", {}, "Detection"), roc] : []),
      make("h3", {}, "Make it again"),
      ...cell.runs.map((run) => runArticle(data.runs[run], data.rows[run])));
    dialog.showModal();
    dialog.scrollTop = 0;
    close.focus();
    history.replaceState(null, "", `#cell-${place}`);
    for (const [, chart, values, unit] of charts) draw(chart, "loss", { history: values }, (spec) => {
      spec.mark.point = values.length <= 60;
      spec.encoding.x.title = spec.encoding.tooltip[1].title = unit;
      return spec;
    });
    for (const [, chart, values] of judged) draw(chart, "rounds", { rounds: values });
    if (curves.length) draw(roc, "detection", { detection: curves.map((point) => ({ ...point, seed: String(point.seed) })) },
      (spec) => {
        spec.encoding.color = { field: "seed", type: "nominal" };
        spec.encoding.opacity = { value: 0.9 };
        delete spec.encoding.strokeDash;
        delete spec.params;
        return spec;
      });
  };
  dialog.addEventListener("close", () => {
    const place = location.hash.match(/^#cell-(\d+)$/)?.[1];
    history.replaceState(null, "", location.pathname + location.search);
    document.querySelector(`[data-cell="${place}"]`)?.focus();
    dialog.replaceChildren();
    redraw();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  // Numbers as CSV

  const csvValue = (value) => {
    if (value === null || value === undefined) return "";
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (records) => {
    const columns = [...new Set(records.flatMap((record) => Object.keys(record)))];
    return [columns, ...records.map((record) => columns.map((column) => record[column]))]
      .map((line) => line.map(csvValue).join(",")).join("\r\n") + "\r\n";
  };
  for (const button of document.querySelectorAll("[data-csv]")) button.addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([csv(data[button.dataset.csv])], { type: "text/csv" }));
    make("a", { href: url, download: `bdbench-${button.dataset.csv}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });

  // Page

  const theme = document.getElementById("theme");
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
    redraw();
  });
  dark.addEventListener("change", () => { showTheme(); redraw(); });
  showTheme();

  for (const input of document.querySelectorAll("input[name=metric]")) input.addEventListener("change", () => {
    root.dataset.metric = input.value;
    for (const head of document.querySelectorAll(".heat [aria-sort]")) head.setAttribute("aria-sort", "none");
    say(`showing ${input.nextElementSibling.textContent}`);
  });
  const chosen = document.querySelector("input[name=metric]:checked");
  if (chosen) root.dataset.metric = chosen.value;

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-cell]");
    if (button) open(Number(button.dataset.cell));
  });
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  document.addEventListener("keydown", (event) => {
    const cell = event.target.closest?.(".cell");
    const step = STEPS[event.key];
    if (!cell || !step) return;
    const row = cell.closest("tbody").rows[cell.parentElement.sectionRowIndex + step[0]];
    const next = row?.cells[cell.cellIndex + step[1]]?.querySelector("button");
    if (next) { next.focus(); event.preventDefault(); }
  });
  document.querySelectorAll(".matrix").forEach(drawMatrix);
  const asked = location.hash.match(/^#cell-(\d+)$/)?.[1];
  if (asked && data.cells[asked]) open(Number(asked));
})();
