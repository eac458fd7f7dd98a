
"use strict";
(() => {
  const STEP = 50;
  const DECISIONS = ["confirmed", "overruled", "fine"];
  const KEYS = { c: "confirmed", o: "overruled", f: "fine", u: "" };
  const fingerprint = JSON.parse(document.body.dataset.fingerprint);
  const place = "jaxpoison audit " + fingerprint;
  const byId = (id) => document.getElementById(id);
  const list = byId("list");
  if (!list) return;

  const findings = [...list.children].map((element, rank) => ({
    element,
    rank,
    id: JSON.parse(element.dataset.id),
    kind: element.dataset.kind,
    class: JSON.parse(element.dataset.class),
    checks: JSON.parse(element.dataset.checks),
    severity: Number(element.dataset.severity),
    confidence: Number(element.dataset.confidence),
    text: element.querySelector(".why").textContent.toLowerCase(),
    decision: element.dataset.decision,
    reported: element.dataset.decision,
  }));
  const undrawn = [...document.querySelectorAll(".undrawn")].map(
    (element) => [JSON.parse(element.dataset.id), element.value]);
  let matching = findings;
  let shown = STEP;
  let storing = true;

  // What differs from the report is kept in the browser, where it allows that.
  const stored = () => {
    try {
      const kept = JSON.parse(localStorage.getItem(place) || "{}");
      return new Map(Object.entries(kept).filter(([, said]) => said === "" || DECISIONS.includes(said)));
    } catch {
      return new Map();
    }
  };
  const store = () => {
    try {
      localStorage.setItem(place, JSON.stringify(
        Object.fromEntries(findings.filter((finding) => finding.decision !== finding.reported)
          .map((finding) => [finding.id, finding.decision]))));
      storing = true;
    } catch {
      storing = false;
    }
  };

  const label = (finding) => {
    finding.element.dataset.decision = finding.decision;
    for (const button of finding.element.querySelectorAll(".buttons button"))
      button.setAttribute("aria-pressed", String(button.value === finding.decision));
  };
  const progress = () => {
    const number = (said) => findings.filter((finding) => finding.decision === said).length;
    const done = findings.length - number("");
    byId("progress").textContent = `${done} of ${findings.length} decided`
      + (done ? `: ${DECISIONS.map((said) => `${number(said)} ${said}`).join(", ")}` : "")
      + (storing ? "" : ". This browser does not keep them: save before you close the page");
  };
  const decide = (finding, said) => {
    finding.decision = said;
    label(finding);
    store();
    progress();
  };

  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const orders = {
    rank: () => 0,
    severity: (a, b) => b.severity - a.severity || b.confidence - a.confidence,
    confidence: (a, b) => b.confidence - a.confidence,
    class: (a, b) => compare(a.class, b.class),
    name: (a, b) => compare(a.id, b.id),
  };
  const form = document.querySelector(".filters");
  const draw = () => {
    const visible = new Set(matching.slice(0, shown));
    for (const finding of findings) finding.element.hidden = !visible.has(finding);
    const left = matching.length - visible.size;
    byId("more").hidden = left === 0;
    byId("more").textContent = `Show ${Math.min(left, STEP)} more`;
    byId("status").textContent = matching.length === findings.length
      ? `${findings.length} findings`
      : `${matching.length} of ${findings.length} findings`;
  };
  const filter = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const text = wanted.text.trim().toLowerCase();
    matching = findings.filter((finding) =>
      (!wanted.kind || finding.kind === wanted.kind)
      && (!wanted.class || finding.class === JSON.parse(wanted.class))
      && (!wanted.check || finding.checks.includes(JSON.parse(wanted.check)))
      && (!wanted.decided || (finding.decision === "") === (wanted.decided === "open"))
      && finding.text.includes(text));
    matching.sort((a, b) => orders[wanted.sort](a, b) || a.rank - b.rank);
    list.append(...matching.map((finding) => finding.element));
    shown = STEP;
    draw();
  };

  const current = () => matching.findIndex((finding) => finding.element.contains(document.activeElement));
  const go = (index) => {
    if (index < 0 || index >= matching.length) return;
    if (index >= shown) {
      shown = index + STEP;
      draw();
    }
    matching[index].element.focus({ preventScroll: true });
    matching[index].element.scrollIntoView({ block: "nearest" });
  };
  // A link to a finding that is filtered away or further down shows it.
  const follow = () => {
    const target = findings.find((finding) => `#${finding.element.id}` === location.hash);
    if (!target) return;
    if (!matching.includes(target)) {
      form.reset();
      filter();
    }
    go(matching.indexOf(target));
    target.element.scrollIntoView({ block: "start" });
  };

  const save = () => {
    const decisions = Object.fromEntries([
      ...undrawn, ...findings.map((finding) => [finding.id, finding.decision]),
    ].filter(([, said]) => said));
    const text = JSON.stringify({ version: 1, fingerprint, decisions }, null, 1) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "decisions.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const at = current();
    const step = { j: 1, k: -1, ...(at < 0 ? {} : { ArrowDown: 1, ArrowUp: -1 }) }[event.key];
    if (step) go(at < 0 ? 0 : at + step);
    else if (at >= 0 && event.key in KEYS) {
      decide(matching[at], KEYS[event.key]);
      if (KEYS[event.key]) go(at + 1);
    } else return;
    event.preventDefault();
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest(".buttons button");
    if (!button) return;
    const finding = findings.find((each) => each.element.contains(button));
    decide(finding, finding.decision === button.value ? "" : button.value);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  byId("all").addEventListener("click", () => {
    form.reset();
    filter();
  });
  byId("more").addEventListener("click", () => {
    const next = shown;
    shown += STEP;
    draw();
    go(next);
  });
  byId("save").addEventListener("click", save);
  for (const link of document.querySelectorAll("[data-show-kind]"))
    link.addEventListener("click", () => {
      form.reset();
      form.elements.kind.value = link.dataset.showKind;
      filter();
    });
  window.addEventListener("hashchange", follow);

  document.documentElement.classList.add("script");
  for (const element of document.querySelectorAll(".needs-script")) element.hidden = false;
  const kept = stored();
  for (const finding of findings) {
    if (kept.has(finding.id)) finding.decision = kept.get(finding.id);
    label(finding);
  }
  filter();
  progress();
  follow();
})();
