// Conversations in the browser's own database, and choices that outlive a visit.

const opened = new Promise((resolve, reject) => {
  const asked = indexedDB.open("hadal", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore("talks", { keyPath: "id" });
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => reject(asked.error);
});

async function run(mode, make) {
  const store = (await opened).transaction("talks", mode).objectStore("talks");
  const asked = make(store);
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    store.transaction.onerror = store.transaction.onabort = () => reject(asked.error ?? store.transaction.error);
  });
}

export const all = () => run("readonly", (store) => store.getAll());
export const get = (id) => run("readonly", (store) => store.get(id));
export const put = (talk) => run("readwrite", (store) => store.put(talk));
export const drop = (id) => run("readwrite", (store) => store.delete(id));

export const recall = (name, otherwise) => JSON.parse(localStorage.getItem(`hadal.${name}`) ?? "null") ?? otherwise;
export const keep = (name, value) => localStorage.setItem(`hadal.${name}`, JSON.stringify(value));
