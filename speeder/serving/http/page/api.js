// The server's API. Paths are relative, so that the page works behind any prefix.

export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function answer(response) {
  if (response.ok) return response.json();
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).errors[0].message;
  } catch { /* a proxy's answer, which is no JSON */ }
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

export async function get(path, parameters, signal) {
  const query = parameters ? `?${new URLSearchParams(parameters)}` : "";
  return answer(await fetch(path + query, { signal }));
}

// On a full queue (503), wait as long as Retry-After says and try again, twice at most.
export async function post(path, body, signal, tries = 3) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    return await answer(response);
  } catch (error) {
    if (error.status !== 503 || tries <= 1) throw error;
    await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(error.retryAfter || 1, 5)));
    signal?.throwIfAborted();
    return post(path, body, signal, tries - 1);
  }
}
