import { durationMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import * as rpc from "./generated/google/rpc/error_details_pb.js";
import type { ErrorReason } from "./generated/milepost/v1/errors_pb.js";

/** The name of a value of `ErrorReason`, whose comments tell what to do. Later servers may send other names. */
export type ErrorReasonName = keyof typeof ErrorReason | (string & {});

/** A detail of an error. Its `$typeName` tells which. */
export type ErrorDetail = rpc.ErrorInfo | rpc.PreconditionFailure | rpc.QuotaFailure | rpc.ResourceInfo;

/** A call that failed. */
export class MilepostError extends Error {
  override readonly name = "MilepostError";
  /** The error of Connect that this error explains. */
  declare readonly cause: ConnectError;
  /** The status code. */
  readonly code: Code;
  /** Why the call failed. Undefined for an error that no milepost server has sent, such as a broken connection. */
  readonly reason: ErrorReasonName | undefined;
  /** The fields of the request at fault. */
  readonly fieldViolations: readonly rpc.BadRequest_FieldViolation[];
  /** The time after which the same request may succeed. */
  readonly retryDelayMs: number | undefined;
  /** The other details of the error. */
  readonly details: readonly ErrorDetail[];

  private constructor(cause: ConnectError) {
    super(cause.message, { cause });
    const infos = cause.findDetails(rpc.ErrorInfoSchema);
    const delay = cause.findDetails(rpc.RetryInfoSchema)[0]?.retryDelay;
    this.code = cause.code;
    this.reason = infos.find(({ domain }) => domain === "milepost")?.reason;
    this.fieldViolations = cause.findDetails(rpc.BadRequestSchema).flatMap(({ fieldViolations }) => fieldViolations);
    this.retryDelayMs = delay && durationMs(delay);
    this.details = [
      ...infos,
      ...cause.findDetails(rpc.PreconditionFailureSchema),
      ...cause.findDetails(rpc.QuotaFailureSchema),
      ...cause.findDetails(rpc.ResourceInfoSchema),
    ];
  }

  /** Explains what a call by a generated client has thrown. */
  static from(error: unknown): MilepostError {
    return error instanceof MilepostError ? error : new MilepostError(ConnectError.from(error));
  }
}

/**
 * Codes of a connection that broke before the first message. Connect-ES says INVALID_ARGUMENT if an answer ends too
 * early. With ErrorInfo, which a broken connection lacks, they mean something else.
 */
const BROKEN = [
  Code.Aborted,
  Code.Canceled,
  Code.DeadlineExceeded,
  Code.Internal,
  Code.InvalidArgument,
  Code.ResourceExhausted,
  Code.Unavailable,
  Code.Unknown,
];

/** Whether the same call may succeed later. `heard` tells that its stream has sent a message. */
export function isTransient({ code, reason, retryDelayMs }: MilepostError, heard = false): boolean {
  if (reason === undefined) return heard || BROKEN.includes(code);
  if (code === Code.ResourceExhausted) return retryDelayMs !== undefined;
  return code === Code.Unavailable || code === Code.DeadlineExceeded;
}
