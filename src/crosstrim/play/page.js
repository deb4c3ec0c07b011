() => {
  // Gradio's slider tells of its release when a pointer lets go of it. When a key does, it is told here.
  const moves = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End", "Enter"]);
  document.addEventListener("keyup", (event) => {
    if (moves.has(event.key) && event.target.closest("#budget input"))
      event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  });

  // On a phone the answer is far below the question.
  document.addEventListener("click", (event) => {
    if (event.target.closest("#ask") && matchMedia("(max-width: 640px)").matches)
      document.querySelector("#result")?.scrollIntoView({ behavior: "smooth", block: "center" });
  });

  // Gradio gives the pictures on its buttons no names.
  const name = () => {
    for (const image of document.querySelectorAll('#examples img[alt=""]'))
      image.alt = `Example: ${image.src.split("/").pop().replace(/\.\w+$/, "")}`;
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
