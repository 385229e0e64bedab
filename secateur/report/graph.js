(function () {
  "use strict";
  const { groups, rows, names, row: HEIGHT } = JSON.parse(document.getElementById("graph").textContent);
  const VERB = { p: "makes", c: "reads", f: "follows" };
  const HEADING = { p: "Made by", c: "Read by", f: "Followed by" };
  const get = (id) => document.getElementById(id);
  const sheet = document.querySelector(".sheet");
  const [svg, band, tip, panel, detail, filter, found] = ["strands", "band", "tip", "panel", "detail", "filter", "found"].map(get);
  const strands = Array.from(svg.querySelectorAll(".strand"));
  const labels = Array.from(document.querySelectorAll(".names button"));
  const buttons = Array.from(document.querySelectorAll(".list button"));
  const narrow = matchMedia("(max-width:980px)"); // as in the style sheet, where the panel is no column of its own
  let told = -1; // the group that is told in full
  panel.hidden = false;

  function element(tag, text, type) {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (type) made.className = type;
    return made;
  }
  const percent = (share) => (100 * share).toFixed(1) + "%";
  // A layer's name, or the parameter's where the model itself owns it.
  const title = ([name, tensors]) => names[name] || tensors;
  const share = (group, count) => (count < group.size ? count + " of " + group.size : "");
  const touching = (row) => groups.flatMap((group, i) => (group.marks.some((mark) => mark[1] === row && !mark[2]) ? [i] : []));
  const brief = (group) => group.size + " channels, " + percent(group.macs) + " of the MACs";
  function about(group) {
    const free = group.removable < group.size ? ", " + group.removable + " removable" : "";
    return group.size + " channels" + free + "; " + percent(group.macs) + " of the MACs go with all of them";
  }

  // ---- what is picked --------------------------------------------------------------------------------------------
  // Without a heading, what is picked is one group, told in full; with one, the groups that it found.
  function pick(chosen, heading, none, stays) {
    told = chosen.length && !heading ? chosen[0] : -1;
    const marked = new Set(chosen.flatMap((i) => groups[i].marks.filter((mark) => !mark[2]).map((mark) => mark[1])));
    sheet.classList.toggle("picking", chosen.length > 0);
    panel.classList.toggle("picked", chosen.length > 0 || Boolean(heading));
    strands.forEach((strand, i) => strand.classList.toggle("on", chosen.includes(i)));
    labels.forEach((label, i) => label.classList.toggle("on", marked.has(i)));
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(chosen.includes(i))));
    detail.replaceChildren();
    if (!chosen.length && !heading) { detail.append(element("p", "Press a strand, a layer or a name to see what goes together.", "hint")); return; }
    const clear = element("button", "Clear", "clear");
    clear.type = "button";
    clear.addEventListener("click", () => { filter.value = ""; search(); });
    detail.append(clear, element("h3", heading || groups[chosen[0]].name));
    if (!narrow.matches) requestAnimationFrame(() => panel.scrollIntoView({ block: "nearest" }));
    if (!heading) { tell(groups[chosen[0]]); return; }
    if (stays) detail.append(element("p", "Its outputs stay: " + stays, "warn"));
    detail.append(element("p", chosen.length ? "in " + chosen.length + (chosen.length === 1 ? " group" : " groups") : none));
    const list = element("ul");
    chosen.forEach((i) => { const item = element("li", groups[i].name + " "); item.append(element("small", brief(groups[i]))); list.append(item); });
    detail.append(list);
  }
  function tell(group) {
    detail.append(element("p", about(group) + "."));
    if (group.constraint) detail.append(element("p", "Constraint: " + group.constraint + ".", "warn"));
    if (group.inexact) detail.append(element("p", "Inexact: " + group.inexact, "warn"));
    for (const role of "pcf") {
      const members = group.marks.filter((mark) => mark[0] === role).flatMap((mark) => mark[3]);
      if (!members.length) continue;
      const list = element("ul");
      members.forEach((member) => {
        const item = element("li", title(member) + " ");
        item.append(element("small", [names[member[0]] ? member[1].replaceAll(" ", ", ") : "", share(group, member[2])].filter(Boolean).join("; ")));
        list.append(item);
      });
      detail.append(element("h4", HEADING[role] + " (" + members.length + ")"), list);
    }
  }
  function toggle(i) { pick(told === i ? [] : [i]); }
  strands.forEach((strand, i) => strand.addEventListener("click", (event) => { event.stopPropagation(); toggle(i); }));
  buttons.forEach((button, i) => button.addEventListener("click", () => { toggle(i); show(groups[i].marks[0][1]); }));
  labels.forEach((label, row) => label.addEventListener("click", () => pick(touching(row), rows[row][0] || "the model", "in no group", rows[row][2])));
  svg.addEventListener("click", () => pick([]));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { filter.value = ""; search(); } });
  function show(row) {
    const box = labels[row].getBoundingClientRect();
    if (box.top < 70 || box.bottom > innerHeight - 20) scrollBy({ top: box.top - innerHeight / 3 });
  }

  // ---- the filter ------------------------------------------------------------------------------------------------
  const words = groups.map((group) => [group.name, ...group.marks.flatMap((mark) => mark[3].map(title))].join("\n").toLowerCase());
  function search() {
    const text = filter.value.trim().toLowerCase();
    const fitting = text ? groups.flatMap((_, i) => (words[i].includes(text) ? [i] : [])) : [];
    buttons.forEach((button, i) => { button.parentElement.hidden = text !== "" && !fitting.includes(i); });
    found.textContent = text ? fitting.length + " of " + groups.length + " groups have it" : "";
    pick(fitting, text && fitting.length !== 1 ? "“" + filter.value.trim() + "”" : "", "No group has a layer of this name.");
    if (text) {
      const first = labels.findIndex((label) => label.textContent.toLowerCase().includes(text));
      if (first >= 0) show(first);
    }
  }
  filter.addEventListener("input", search);

  // ---- under the pointer -----------------------------------------------------------------------------------------
  function point(event) {
    const y = event.clientY - svg.getBoundingClientRect().top;
    const row = Math.max(0, Math.min(rows.length - 1, Math.floor(y / HEIGHT)));
    band.setAttribute("y", row * HEIGHT);
    labels.forEach((label, i) => label.classList.toggle("over", i === row));
    const strand = event.target.closest(".strand");
    if (!strand) { tip.hidden = true; return; }
    const group = groups[Number(strand.dataset.group)];
    const place = (mark) => (mark[1] + (mark[2] ? 1 : 0.5)) * HEIGHT;
    const near = group.marks.filter((mark) => Math.abs(place(mark) - y) <= 6).sort((a, b) => Math.abs(place(a) - y) - Math.abs(place(b) - y) || "pcf".indexOf(a[0]) - "pcf".indexOf(b[0]));
    tip.replaceChildren();
    near.slice(0, 2).flatMap((mark) => mark[3].map((member) => [mark[0], member])).slice(0, 4).forEach(([role, member]) => {
      const line = element("div"), part = share(group, member[2]);
      line.append(element("b", title(member)), " " + VERB[role] + (part ? " " + part + " of its channels" : " them"));
      tip.append(line);
    });
    const head = element("div", "group ");
    head.append(element("b", group.name));
    tip.prepend(head);
    tip.append(element("div", about(group)));
    const rules = [group.constraint, group.inexact && "inexact: " + group.inexact].filter(Boolean).join("; ");
    tip.append(element("div", rules || "free: any of them may go"));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16) + "px";
  }
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; band.setAttribute("y", -2 * HEIGHT); labels.forEach((label) => label.classList.remove("over")); });
  document.documentElement.dataset.drawn = "all";
})();
