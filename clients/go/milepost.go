// Package milepost is a client for milepost, a gRPC service that shows people the progress of
// work that others run for them. [Watch] watches the events of jobs and resumes by itself, and
// a [Publisher] appends events. The package milepostv1 has the generated messages and clients
// of all methods.
package milepost

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// Job names a job by one of its two ids.
type Job struct {
	// ID is the job's id.
	ID string
	// ProviderJobID is the provider's id of the job, which only this provider may use.
	ProviderJobID string
}

// Dial returns a connection to a server, whose calls carry the credential: the secret of a
// session, an API key or a watch token, or an empty text. The server is https://HOST:PORT, which
// is encrypted, http://HOST:PORT, which is not, or HOST:PORT, which is encrypted unless the host
// is loopback. The options are applied after those that Dial sets. Dial does not wait for the
// server: the first call connects.
func Dial(server, credential string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	hostPort, encrypted, ok := parseServer(server)
	if !ok {
		return nil, invalid("%q is not a server address: write HOST:PORT, https://HOST:PORT or http://HOST:PORT", server)
	}
	if strings.ContainsFunc(credential, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, invalid("the credential contains characters that no credential of milepost has: copy it again")
	}
	transport := insecure.NewCredentials()
	if encrypted {
		transport = credentials.NewTLS(&tls.Config{})
	}
	settings := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstPause, Multiplier: 2, Jitter: 0.2, MaxDelay: 4 * time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
	}
	if credential != "" {
		settings = append(settings, grpc.WithPerRPCCredentials(bearer{credential, encrypted}))
	}
	return grpc.NewClient("dns:///"+hostPort, append(settings, options...)...)
}

// parseServer returns the host and port of an address as Dial takes it.
func parseServer(server string) (hostPort string, encrypted, ok bool) {
	scheme, address, hasScheme := strings.Cut(server, "://")
	if !hasScheme {
		scheme, address = "", server
	}
	address = strings.TrimSuffix(address, "/")
	host, port, err := net.SplitHostPort(address)
	_, portErr := strconv.ParseUint(port, 10, 16)
	if err != nil || portErr != nil || host == "" || strings.ContainsAny(host, "/@ ") {
		return "", false, false
	}
	switch strings.ToLower(scheme) {
	case "https":
		encrypted = true
	case "http":
	case "":
		ip, _ := netip.ParseAddr(host)
		encrypted = host != "localhost" && !ip.IsLoopback()
	default:
		return "", false, false
	}
	return address, encrypted, true
}

// bearer adds a credential to each call.
type bearer struct {
	credential string
	encrypted  bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.credential}, nil
}

func (b bearer) RequireTransportSecurity() bool { return b.encrypted }
