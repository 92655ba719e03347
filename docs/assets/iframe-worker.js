// Search runs in a worker, which browsers refuse to pages opened as files. There it runs in a hidden frame instead.

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.scope = frame.contentWindow;
      this.scope.document.open();
      this.ready = new Promise((resolve) => {
        this.scope.ready = resolve;
      });
      this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.scope.document.write(`<script src="${url}" onload="ready()"></script>`);
      this.scope.document.close();
    }

    async postMessage(data) {
      await this.ready;
      this.scope.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
