package milepost

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error is the error of a call. [errors.As] finds it in the errors of this package, and
// [status.FromError] returns its status. It wraps the error of grpc, or the context's error if
// the context of the caller ended the call.
type Error struct {
	// Code is the status code.
	Code codes.Code
	// Message is a text for developers.
	Message string
	// Reason is the name of a value of milepostv1.ErrorReason without the prefix
	// ERROR_REASON_. Empty: the error does not come from a service of milepost.
	Reason string
	// Violations are the fields at fault.
	Violations []*errdetails.BadRequest_FieldViolation
	// RetryDelay is the time after which the same request may succeed. 0: there is none.
	RetryDelay time.Duration
	// Details are all details of the status: a *errdetails.ErrorInfo and others.
	Details []any

	status *status.Status
	cause  error
}

func newError(cause error) *Error {
	s, ok := status.FromError(cause)
	if !ok {
		s = status.FromContextError(cause)
	}
	e := &Error{Code: s.Code(), Message: s.Message(), Details: s.Details(), status: s, cause: cause}
	for _, detail := range e.Details {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == "milepost" {
				e.Reason = detail.GetReason()
			}
		case *errdetails.BadRequest:
			e.Violations = detail.GetFieldViolations()
		case *errdetails.RetryInfo:
			e.RetryDelay = detail.GetRetryDelay().AsDuration()
		}
	}
	return e
}

func invalid(format string, values ...any) *Error {
	return newError(status.Errorf(codes.InvalidArgument, format, values...))
}

// Error returns the reason, or the code if there is none, and the message, which names the fields
// at fault.
func (e *Error) Error() string {
	return fmt.Sprintf("milepost: %s: %s", cmp.Or(e.Reason, e.Code.String()), e.Message)
}

// Unwrap returns the error of grpc or of the context.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus returns the status, for [status.FromError].
func (e *Error) GRPCStatus() *status.Status { return e.status }

// transient says whether the same request may succeed later.
func (e *Error) transient() bool {
	switch e.Code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	case codes.ResourceExhausted:
		return e.Reason == "" || e.RetryDelay > 0
	case codes.Unknown, codes.Internal, codes.Canceled, codes.Aborted:
		return e.Reason == ""
	default:
		return false
	}
}

const (
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
)

// pauses are the pauses before further attempts: they double, half of each by chance.
type pauses struct{ last time.Duration }

func (p *pauses) next(failure *Error) time.Duration {
	p.last = min(max(2*p.last, firstPause), longestPause)
	return max(p.last/2+rand.N(p.last/2), failure.RetryDelay)
}

// sleep returns an error if the context ends before the time has passed.
func sleep(ctx context.Context, duration time.Duration) error {
	select {
	case <-time.After(duration):
		return nil
	case <-ctx.Done():
		return newError(ctx.Err())
	}
}
