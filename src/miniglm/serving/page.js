// Runs before Gradio does. The language: ?__lang= in the address, else what was chosen before, else the browser's own.
// Gradio takes it from the browser; handlers on the server find it in the cookie.
(() => {
  const asked = new URLSearchParams(location.search).get("__lang");
  const kept = document.cookie.match(/(?:^|; )miniglm_lang=([\w-]+)/)?.[1];
  const language = [asked, kept, navigator.language, "en"].find(Boolean).toLowerCase().startsWith("zh") ? "zh-CN" : "en";
  if (asked) document.cookie = `miniglm_lang=${language}; path=/; max-age=31536000; samesite=lax`;
  Object.defineProperty(navigator, "language", { get: () => language });
  Object.defineProperty(navigator, "languages", { get: () => [language] });
  document.documentElement.lang = language;

  // Gradio opens every link in a new window; the other language belongs into this one.
  document.addEventListener("click", event => event.target.closest?.("a.language")?.removeAttribute("target"), true);

  // A source that is opened is scrolled to, and the keyboard goes along; Escape shuts it and brings it back.
  let opener = null;
  document.addEventListener("click", event => (opener = event.target.closest?.("#conversation .option") ?? opener), true);
  document.addEventListener("keydown", event => event.key === "Escape" && document.querySelector("#shut")?.click());
  new MutationObserver(() => {
    if (!opener) return;
    const shut = document.querySelector("#shut"), mark = document.querySelector("#opened mark");
    if (mark && mark !== opener.mark) {
      opener.mark = mark;
      mark.scrollIntoView({ block: "center" });
      shut.focus({ preventScroll: true });
    } else if (!shut && opener.mark) {
      delete opener.mark;
      opener.focus();
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  // Texts carry a word joiner after "<" and "&" so that they are shown as they are (see page.py); copies go without.
  const clipboard = navigator.clipboard;
  if (clipboard) {
    const write = clipboard.writeText.bind(clipboard);
    document.addEventListener("click", async event => {
      const button = event.target.closest?.("#copy");
      if (!button) return;
      await clipboard.writeText(document.querySelector("#made textarea").value);
      button.dataset.copied = "";
      setTimeout(() => delete button.dataset.copied, 2000);
    });
    clipboard.writeText = text => write(text.replace(/([<&])\u2060/g, "$1"));
  }
  document.addEventListener("copy", event => {
    const text = String(getSelection());
    if (!/[<&]\u2060/.test(text)) return;
    event.clipboardData.setData("text/plain", text.replace(/([<&])\u2060/g, "$1"));
    event.preventDefault();
  });
})();
