package milepost

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	milepostv1 "milepost/clients/go/milepost/v1"
)

func TestOnlyLoopbackAndHttpAddressesAreNotEncrypted(t *testing.T) {
	for _, test := range []struct {
		server, hostPort string
		encrypted, ok    bool
	}{
		{"127.0.0.1:50051", "127.0.0.1:50051", false, true},
		{"127.9.9.9:1", "127.9.9.9:1", false, true},
		{"[::1]:50051", "[::1]:50051", false, true},
		{"localhost:50051", "localhost:50051", false, true},
		{"http://10.0.0.1:50051", "10.0.0.1:50051", false, true},
		{"http://10.0.0.1:50051/", "10.0.0.1:50051", false, true},
		{"localhost.example.com:50051", "localhost.example.com:50051", true, true},
		{"127.0.0.1.example.com:50051", "127.0.0.1.example.com:50051", true, true},
		{"10.0.0.1:50051", "10.0.0.1:50051", true, true},
		{"https://127.0.0.1:50051", "127.0.0.1:50051", true, true},
		{"HTTPS://a:1", "a:1", true, true},
		{"https://a", "", false, false},
		{"localhost", "", false, false},
		{"ftp://a:1", "", false, false},
		{"http://a:1/path", "", false, false},
		{"http://a:1?b", "", false, false},
		{"user@a:1", "", false, false},
		{"unix:///a", "", false, false},
		{":1", "", false, false},
		{"a b", "", false, false},
		{"", "", false, false},
	} {
		hostPort, encrypted, ok := parseServer(test.server)
		if ok != test.ok || ok && (hostPort != test.hostPort || encrypted != test.encrypted) {
			t.Errorf("%s: %s, %t, %t", test.server, hostPort, encrypted, ok)
		}
	}
}

func TestDialRefusesWhatCannotWork(t *testing.T) {
	for _, arguments := range [][2]string{{"ftp://a:1", ""}, {"a:1", "mpk_copied\n"}, {"a:1", "mpk_ä"}} {
		if _, err := Dial(arguments[0], arguments[1]); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", arguments, err)
		}
	}
}

func TestAnHttpsAddressIsEncryptedAndVerified(t *testing.T) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	certificate := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	listener := must(tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}},
	}))
	p := newProxy(listener)
	defer listener.Close()
	defer p.cut()
	authorities := filepath.Join(t.TempDir(), "authorities.pem")
	if err := os.WriteFile(authorities, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", authorities)
	conn := must(Dial("https://"+p.address, provider.key))
	defer conn.Close()
	answer, err := milepostv1.NewAuthServiceClient(conn).GetCurrentUser(t.Context(), &milepostv1.GetCurrentUserRequest{})
	if err != nil || answer.GetUser().GetId() != provider.id {
		t.Fatalf("%v, %v", answer, err)
	}
}

func TestPausesDoubleUpToALimitAndKeepTheDelayOfTheServer(t *testing.T) {
	var pauses pauses
	for _, whole := range []time.Duration{100, 200, 400, 800, 1600, 3200, 5000, 5000} {
		whole *= time.Millisecond
		if pause := pauses.next(&Error{}); pause < whole/2 || pause > whole {
			t.Errorf("%v of %v", pause, whole)
		}
	}
	if pause := pauses.next(&Error{RetryDelay: time.Minute}); pause != time.Minute {
		t.Errorf("%v instead of a minute", pause)
	}
}

func TestTransientErrors(t *testing.T) {
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		var broken, refused, delayed bool
		switch code {
		case codes.Unavailable, codes.DeadlineExceeded:
			broken, refused, delayed = true, true, true
		case codes.ResourceExhausted:
			broken, delayed = true, true
		case codes.Unknown, codes.Internal, codes.Canceled, codes.Aborted:
			broken = true
		}
		for _, test := range []struct {
			err  Error
			want bool
		}{
			{Error{Code: code}, broken},
			{Error{Code: code, Reason: "ANY"}, refused},
			{Error{Code: code, Reason: "ANY", RetryDelay: time.Second}, delayed},
		} {
			if test.err.transient() != test.want {
				t.Errorf("%v: not %t", test.err, test.want)
			}
		}
	}
}
