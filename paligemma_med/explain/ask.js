"use strict";
// The page to ask on. All texts are put in as texts; the server that it came from is the only one it talks to.
(() => {
  const $ = id => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  let image = null, source = null, count = 0, busy = false;

  async function post(address, body, headers = {}) {
    let reply;
    try {
      reply = await fetch(address, { method: "POST", body, headers, credentials: "omit" });
    } catch {
      throw new Error("The program doesn’t answer: has it ended? Its terminal says more.");
    }
    const found = await reply.json().catch(() => ({ error: "The program’s answer can’t be read." }));
    if (!reply.ok || found.error) throw new Error(found.error || `The program answers ${reply.status}.`);
    return found;
  }
  const send = (address, value) => post(address, JSON.stringify(value), { "Content-Type": "application/json" });

  function say(text) { $("status").textContent = text; }

  // Runs one action at a time; what goes wrong is told in the page.
  async function run(doing, action) {
    if (busy) { say("Still at work: wait for the end of it."); return; }
    busy = true;
    $("error").hidden = true;
    $("go").setAttribute("aria-disabled", "true"); // not disabled, which would take the focus from it
    say(`${doing} …`);
    const timer = setInterval(async () => {
      try {
        const { doing: now } = await (await fetch("state", { credentials: "omit" })).json();
        // Not in the live region, which would be read aloud each time.
        if (busy) $("doing").textContent = now && `${now[0].toUpperCase()}${now.slice(1)} …`;
      } catch { /* the action itself tells it */ }
    }, 1500);
    let said = "";
    try {
      said = await action();
    } catch (e) {
      $("error").textContent = e.message;
      $("error").hidden = false;
    }
    clearInterval(timer);
    busy = false;
    $("doing").textContent = "";
    $("go").removeAttribute("aria-disabled");
    say(said);
  }

  // --- The image ---

  // file: one that the browser has, or {index} of an example. show: the frame and window of it, as tables name them.
  async function open(file, show = "") {
    const found = await (file instanceof Blob
      ? post("image", file, { "X-Name": encodeURIComponent(file.name.toWellFormed?.() ?? "image"), "X-Show": show })
      : send("example", { ...file, show }));
    image = found;
    source = file;
    if (file !== $("file").files[0]) $("file").value = "";
    if (!show) {
      $("window").value = "";
      $("frame").value = 1;
    }
    $("windowed").hidden = !found.has_windows;
    $("framed").hidden = found.frames < 2;
    $("view").hidden = $("windowed").hidden && $("framed").hidden;
    $("frame").max = found.frames;
    $("frames").textContent = `of ${found.frames}`;
    $("picture").src = found.picture;
    $("picture").alt = `The image that is asked about: ${found.name}`;
    const size = `${found.name}, ${found.width} × ${found.height} pixels`;
    $("caption").textContent = [size, ...found.notes].join(". ");
    $("shown").hidden = false;
    if (!show) $("question").focus();
    return `${found.name} is open. Type a question.`;
  }
  function upload(file) {
    run("Reading the image", async () => {
      if (file.size > data.max_bytes) {
        throw new Error(`${file.name} has more than ${data.max_bytes / 2 ** 20} MiB.`);
      }
      return open(file);
    });
  }
  $("file").addEventListener("click", () => { $("file").value = ""; }); // or the same file again would be no change
  $("file").addEventListener("change", () => { if ($("file").files.length) upload($("file").files[0]); });
  $("examples")?.addEventListener("submit", event => {
    event.preventDefault();
    run("Reading the image", () => open({ index: Number($("example").value) }));
  });
  $("view").addEventListener("submit", event => {
    event.preventDefault();
    const frame = Number($("frame").value), name = $("window").value;
    const show = [frame > 1 && `frame=${frame}`, name && `window=${name}`].filter(Boolean).join("|");
    run("Reading the image", () => open(source, show));
  });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, event => {
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop" && event.dataTransfer?.files.length) upload(event.dataTransfer.files[0]);
    });
  }

  // --- Questions ---

  function chip([text, probability]) {
    const out = document.createElement("span"), figure = document.createElement("span");
    out.className = "chip";
    out.setAttribute("role", "listitem");
    out.append(Object.assign(document.createElement("bdi"), { textContent: text }));
    figure.className = "figure";
    figure.textContent = probability;
    out.append(figure);
    return out;
  }
  const plural = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

  function add(found, picture) {
    const article = $("answer").content.cloneNode(true).firstElementChild, q = s => article.querySelector(s);
    const title = `answer-${++count}`;
    q(".thumb").src = picture;
    q(".thumb").alt = found.image;
    q(".kicker").textContent = `${count} · ${found.image}` +
      (found.turns_read ? ` · with ${plural(found.turns_read, "earlier turn")}` : "");
    q("h3").textContent = found.question;
    q("h3").id = title;
    article.setAttribute("aria-labelledby", title);
    q(".answer").textContent = found.answer;
    q(".probability").textContent =
      `with probability ${found.probability} by its own account, which is not the chance that it is right`;
    q(".tokens").append(...found.tokens.map(chip));
    q(".blank").textContent = `Without the image (mid-grey in its place): ${found.blank} ` +
      `(probability ${found.blank_probability})`;
    const notes = [
      found.same && "The same answer without the image: it need not rest on what the image shows.",
      found.tokens_cut && `The question was too long: its last ${plural(found.tokens_cut, "token")} were not read.`,
      found.turns_left_out && `There was no room for ${plural(found.turns_left_out, "earlier turn")}.`,
      !found.ended && "The answer was cut off at its greatest length.",
    ].filter(Boolean);
    q(".notes").hidden = !notes.length;
    q(".notes").append(...notes.map(text => Object.assign(document.createElement("li"), { textContent: text })));
    const measure = () => run("Measuring what the answer rests on", () => frame(article, found));
    q(".measure").addEventListener("click", measure);
    $("answers").prepend(article);
    $("none").hidden = true;
    return article;
  }
  // The saliency page of an answer, made by the server and shown below it.
  async function frame(article, found) {
    const { page: address } = await send("page", { answer: found.id });
    const out = document.createElement("iframe"), link = document.createElement("a"), line = document.createElement("p");
    out.setAttribute("sandbox", "allow-scripts allow-downloads");
    out.title = `Saliency page of the answer to: ${found.question}`;
    out.src = address;
    Object.assign(link, { href: address, target: "_blank", rel: "noopener", textContent: "Open the page by itself" });
    line.append(link);
    article.querySelector(".page").replaceChildren(line, out);
    return "The saliency page is below the answer.";
  }
  $("ask").addEventListener("submit", event => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!image) { say("Open an image first."); return; }
    if (!question) { say("Type a question."); return; }
    const saliency = $("saliency").checked, history = data.has_turns && $("history").checked;
    const { id, picture } = image;
    run("Answering", async () => {
      const found = await send("ask", { image: id, question, history });
      const article = add(found, picture);
      const said = `Answer: ${found.answer}, probability ${found.probability}. ` +
        `Without the image: ${found.blank}.`;
      $("question").select();
      if (!saliency) return said;
      say(`${said} Measuring what it rests on …`);
      return `${said} ${await frame(article, found)}`;
    });
  });
})();
