import type { Interceptor } from "@connectrpc/connect";

/**
 * An interceptor for a transport, which sends the secret of a session, an API key or a watch token with each call.
 *
 * @throws TypeError if the secret has characters that no secret has.
 */
export function withCredential(secret: string): Interceptor {
  if (!/^[\x21-\x7e]+$/.test(secret)) {
    throw new TypeError("the credential has characters that no milepost credential has: copy it again");
  }
  return (next) => (request) => {
    request.header.set("authorization", `Bearer ${secret}`);
    return next(request);
  };
}
